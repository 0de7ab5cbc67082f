"""Systems that learn from texts alone."""
