"""How many of a batch's rows a factor is made of where nobody said it, and which ones.

A layer of p x q weights computes 6 p q for each of its R rows in a forward and backward; a row of A costs 2 q^2, one of
G 2 p^2. Their mean over r drawn rows has a variance of 1/r, so with a budget for both the sum of their variances is
least where r_A q = r_G p: see `affordable_rows`. The error that this makes is in docs/methods/kfc.md, as measured.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from kfdist.types import BlockShape

SHARE = 0.05
"""What an update's products may cost of a layer's forward and backward; drawing and folding cost as much again."""

LEAST_ROWS = 32
"""Rows that are drawn whatever they cost: with fewer, reading and writing a wide sum takes longer than products."""

CHEAP = 2**23
"""Operations below which a factor is made of all rows: drawing them would last as long, a tenth of a millisecond."""

LEAST_EXAMPLES = 4
"""Examples of which units' gradients are made, whatever that costs."""

CHEAP_ELEMENTS = 2**16
"""Elements of an output whose units are measured for all examples."""


def affordable_rows(shape: BlockShape, rows: int, *, reached: int | None = None) -> tuple[int, int]:
    """Returns how many rows A and G are made of; a pure function of shapes, so that all ranks know it.

    r_A = 3 SHARE R p q / (w (w + p)), r_G = 3 SHARE R q / (w + p), where w of the q inputs differ from zero anywhere:
    2 (r_A w^2 + r_G p^2) is that share of 6 R p q, and r_A w = r_G p.

    Args:
        shape: Of the block.
        rows: R, examples times positions.
        reached: w; None for all.
    """
    p, q, c = shape.d_out, shape.d_in, shape.groups
    w = q if reached is None else min(q, reached)
    both = 3 * SHARE * rows * p * q / (w + p)
    return _at_least(both / w, w, c, rows), _at_least(both / p, p, c, rows)


def affordable_examples(examples: int, elements: int) -> int:
    """Returns of how many examples the Fisher matrices of units are made, each pass over which costs what theirs does.

    Args:
        examples: N.
        elements: Of the output that the units are in.
    """
    return examples if elements <= CHEAP_ELEMENTS else min(examples, max(LEAST_EXAMPLES, examples // 8))


def is_cheap(rows: int, width: int, groups: int) -> bool:
    """Whether a factor is made of all rows before anybody notices."""
    return 2 * rows * width**2 * groups <= CHEAP


def _at_least(affordable: float, width: int, groups: int, rows: int) -> int:
    if is_cheap(rows, width, groups):
        return rows
    return min(rows, max(LEAST_ROWS, math.ceil(affordable)))


def draw_rows(rows: int, count: int, seed: int) -> Int64[Tensor, " count"]:
    """Draws `count` of the rows 0..R-1, one from each of as many equal strata, so that every one is as likely.

    Rows of one example are neighbours: strata spread the draw over all examples. Drawn on the CPU, the same on any
    device; ascending. Where a row lies on the border of two strata it may come twice.
    """
    if count >= rows:
        return torch.arange(rows, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    within = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    return within.add_(_strata(count)).mul_(rows / count).long().clamp_max_(rows - 1)


@lru_cache(maxsize=64)
def _strata(count: int) -> Tensor:
    """Returns the numbers from 0 to `count` - 1, which nobody may change."""
    return torch.arange(count, dtype=torch.float64, device="cpu")
