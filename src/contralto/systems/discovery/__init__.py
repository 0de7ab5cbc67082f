"""Systems that find classes of which nobody has labelled a sample (generalised category discovery)."""
