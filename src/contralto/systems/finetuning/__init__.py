"""Systems that turn a pretrained encoder into a classifier."""
