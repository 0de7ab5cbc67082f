"""From every form in which people have data to one manifest, and from there to batches."""
