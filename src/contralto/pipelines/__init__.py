"""Jobs of several stages, as plain functions over a run folder."""
