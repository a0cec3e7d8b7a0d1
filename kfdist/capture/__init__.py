"""Hooks that turn forward and backward passes into per-step statistics."""
