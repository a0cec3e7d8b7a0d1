"""Tensors and JSON as bytes."""
