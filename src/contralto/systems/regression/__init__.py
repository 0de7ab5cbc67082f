"""Systems that learn to tell a number."""
