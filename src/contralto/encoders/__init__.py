"""Image and text encoders behind one contract each; heads; features computed once."""
