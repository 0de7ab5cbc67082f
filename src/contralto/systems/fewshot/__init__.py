"""Few-shot learning: an encoder from episodes of known classes, for classes of which a few pictures are labelled."""
