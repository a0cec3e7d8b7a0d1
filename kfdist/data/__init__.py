"""Data sets by name, and the sampler that deals them to the ranks."""
