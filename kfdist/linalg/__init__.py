"""Pure functions on tensors, shared by the inversion methods."""
