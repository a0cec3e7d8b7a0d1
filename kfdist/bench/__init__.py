"""Measurements that back what the documentation claims; `benchmarks/` holds the scripts that run them."""
