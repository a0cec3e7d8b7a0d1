"""How many rows a factor is made of where their cost decides, and which: within the budget, and every row alike."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfdist.curvature.blocks.row_budget import CHEAP, LEAST_ROWS, SHARE, affordable_rows, draw_rows
from kfdist.types import BlockShape

SIZES = st.integers(1, 5000)


@given(p=SIZES, q=SIZES, c=st.sampled_from([1, 4]), rows=st.integers(1, 10**6), reached=st.none() | SIZES)
def test_both_factors_cost_a_share_of_the_layers_own_step(p: int, q: int, c: int, rows: int, reached: int | None):
    w = q if reached is None else min(q, reached)
    counts = affordable_rows(BlockShape(d_out=p, d_in=q, groups=c), rows, reached=w)
    costs = [2 * count * width**2 * c for count, width in zip(counts, (w, p), strict=True)]
    least = [2 * min(rows, LEAST_ROWS) * width**2 * c for width in (w, p)]
    one_more = 2 * (w**2 + p**2) * c  # counts are rounded up
    assert sum(costs) <= SHARE * 6 * rows * p * q * c + one_more + sum(least) + 2 * CHEAP
    assert all(1 <= count <= rows for count in counts)


def test_the_counts_of_layers_of_known_networks():
    """By hand: a 3 x 3 convolution of 64 channels on 64 maps of 8 x 8; a layer of 1,024 units and 256 examples."""
    assert affordable_rows(BlockShape(d_out=64, d_in=576), 4096) == (62, 553)
    assert affordable_rows(BlockShape(d_out=1024, d_in=1025), 256) == (LEAST_ROWS, LEAST_ROWS)
    assert affordable_rows(BlockShape(d_out=512, d_in=4608), 64) == (LEAST_ROWS, LEAST_ROWS)
    assert affordable_rows(BlockShape(d_out=512, d_in=4608), 64, reached=512) == (44, 44)
    assert affordable_rows(BlockShape(d_out=10, d_in=65), 128) == (128, 128), "small layers are measured whole"


@settings(max_examples=20)
@given(rows=st.integers(1, 300), share=st.floats(0.01, 1.0), seed=st.integers(0, 2**63 - 1))
def test_as_many_rows_as_asked_are_drawn_all_over_the_batch(rows: int, share: float, seed: int):
    count = max(1, round(share * rows))
    drawn = draw_rows(rows, count, seed)
    assert torch.equal(drawn, draw_rows(rows, count, seed))
    assert len(drawn) == count and drawn[0] >= 0 and drawn[-1] < rows
    assert (drawn.diff() >= 0).all()
    strata = torch.arange(count + 1) * (rows / count)
    assert ((drawn >= strata[:-1].floor()) & (drawn <= strata[1:].ceil())).all()


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (10, 5), (5, 4)])
def test_every_row_is_as_likely(rows: int, count: int):
    seeds = 4000
    drawn = torch.stack([draw_rows(rows, count, seed) for seed in range(seeds)])
    share = drawn.flatten().bincount(minlength=rows) / seeds
    expected = count / rows
    assert (share - expected).abs().max() < 5 * (expected / seeds) ** 0.5
