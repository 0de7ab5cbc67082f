"""Recognition of classes that have a description or a few labels, and of all unlabelled samples at once."""
