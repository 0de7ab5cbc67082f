"""Pure functions: tensors in, a scalar or a loss per sample out."""
