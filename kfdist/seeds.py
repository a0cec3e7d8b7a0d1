"""Seeds from labels, by one hash that never changes: what is drawn depends on names and numbers, never on order.

A release that changed it would draw other sketches, samples and permutations than the replicas and checkpoints of the
one before.
"""

import hashlib


def seed_from(label: str) -> int:
    """Returns a seed in [0, 2^63), which every generator takes: the first bits of the label's SHA-256."""
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1


def block_seed(run_seed: int, block: str, version: int) -> int:
    """Returns the seed of all that is drawn for a block at a version, on every rank and by every owner."""
    return seed_from(f"{run_seed}/{block}/{version}")


def rank_seed(seed: int, rank: int) -> int:
    """Derives from `seed` one that differs from rank to rank."""
    return seed_from(f"{seed}/{rank}")


def split_seed(seed: int, use: str) -> int:
    """Derives from an inversion's seed an independent one for a use, such as "sketch/A"."""
    return seed_from(f"kfdist/{seed}/{use}")
