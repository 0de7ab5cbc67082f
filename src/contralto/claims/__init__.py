"""Each paper's claim as a paired experiment, and how it is judged."""
