"""What runs in every training step reads no value back to the host, which would stall a CUDA stream.

A fake tensor has shapes but no values: reading one raises. So passing on fake tensors proves that nothing is read.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks import Block
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.linalg.psd import pack_triangle, unpack_triangle
from kfdist.wire.records import map_tensors
from tests.support.block_cases import make_block
from tests.support.cases import CASES, DAMPING, InverterCase
from tests.support.coupled import small_chain
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import C, P, Q, make_factors


def test_fake_tensors_catch_a_sync() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(3).isfinite().all())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize(
    ("layer", "activation", "output"),
    [
        (nn.Linear(4, 6), (5, 7, 4), (5, 7, 6)),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (5, 4, 8, 8), (5, 6, 8, 8)),
        (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (5, 4, 10, 10), (5, 6, 8, 8)),
    ],
    ids=["linear", "conv", "circular"],
)
def test_statistics(layer: nn.Module, activation: tuple[int, ...], output: tuple[int, ...], fraction: float) -> None:
    block = make_block("layer", layer)
    assert isinstance(block, Block)
    with FakeTensorMode():
        sums = block.factor_sums(torch.zeros(activation), torch.zeros(output), positions_fraction=fraction)
        assert unpack_triangle(pack_triangle(sums.A)).shape == sums.A.shape


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_application(case: InverterCase) -> None:
    if "max_iterations" in case.settings:  # each of them is the same
        case = replace(case, settings={**case.settings, "max_iterations": 3})
    statistics = case.statistics(make_factors("decaying", torch.float32))
    made = invert_with_ladder(case.make(), statistics, damping=DAMPING, previous={}, seed=0).preconditioner
    assert made is not None
    mode = FakeTensorMode()
    fake = map_tensors(mode.from_tensor, made)
    with mode:
        gradient = torch.zeros(C, P, Q)
        assert fake.apply(gradient, DAMPING).shape == (C, P, Q)
        assert fake.fallback(gradient, DAMPING).shape == (C, P, Q)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("kfac-tridiagonal", {}), ("two-level", {}), ("two-level", {"combination": "additive"})],
)
def test_application_to_a_group(method: str, settings: dict[str, str]) -> None:
    chain = small_chain()
    inverter = make_inverter(method, **settings)
    statistics = chain.chain_factors() if method == "kfac-tridiagonal" else chain.coarse_factors()
    seeds = dict.fromkeys(statistics, 0)
    outcomes = invert_group_with_ladder(inverter, statistics, damping=DAMPING, previous={}, seeds=seeds)
    mode = FakeTensorMode()
    fakes = []
    for outcome in outcomes.values():
        made = outcome.preconditioner
        assert made is not None
        fakes.append(map_tensors(mode.from_tensor, made))
    with mode:
        gradients = [torch.zeros(shape) for shape in chain.shapes]
        found = inverter.produces.apply_group(fakes, gradients, DAMPING, [BlockMemory() for _ in fakes])
        assert [tuple(each.shape) for each in found] == chain.shapes
