"""The adopted inverses multiplied onto the gradients."""
