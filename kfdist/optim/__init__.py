"""Optimizers built on a preconditioner: the adaptive step of the original K-FAC paper."""
