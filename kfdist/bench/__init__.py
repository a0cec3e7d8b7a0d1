"""Measurements behind the figures of the documentation; `kfdist bench` runs them (`benchmarks/` has further ones)."""
