"""Class centres and what is done with them: estimate, update, assign, correct labels."""
