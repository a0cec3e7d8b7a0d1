"""What every method on gradients alone must do, on tensors of one to four dimensions and in both precisions."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kfdist.curvature import adam_moments
from kfdist.curvature.averages import sum_shapes
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.blocks.whole import as_tensors
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.gradient_sums import GradientSums
from kfdist.curvature.inverter import Outcome
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import decode_result, encode_job, encode_result, run_job
from kfdist.curvature.statistics import MODES, GradientMoments
from kfdist.types import BlockShape
from kfdist.wire.records import map_tensors, tensor_fields
from tests.support.captured_methods import OF_GRADIENTS
from tests.support.inversions import invert_with_ladder

SEED, C = 5, 2
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OF_GRADIENTS),
    ("shampoo", {"root": "newton", "accumulate": "sum", "epsilon_rule": "absolute"}),
    ("shampoo", {"exponent": 0.5}),
]
SHAPES = [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 2)]

over_methods = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda each: str(each) or "default")
over_shapes = pytest.mark.parametrize("dims", SHAPES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def made(name: str, settings: dict[str, Any]) -> AbstractGradientInverter:
    inverter = make_inverter(name, **settings)
    assert isinstance(inverter, AbstractGradientInverter)
    return inverter


def statistics(inverter: AbstractGradientInverter, dims: tuple[int, ...], dtype: torch.dtype) -> GradientMoments:
    generator = torch.Generator().manual_seed(sum(dims))
    sums: dict[str, Any] = {}
    for _ in range(6):
        tensor = torch.randn(C, *dims, generator=generator, dtype=torch.float64)
        for mode, moment in inverter.moments(tensor, None, BlockMemory()).items():
            sums[mode] = sums.get(mode, 0.0) + moment
    absent = torch.zeros(C, 0, 0, dtype=dtype)
    moments = {mode: sums[mode].to(dtype) if mode in sums else absent for mode in MODES}
    return GradientMoments(**moments, weight=torch.full((1,), 6.0, dtype=dtype))


@over_methods
@over_shapes
@over_dtypes
def test_keeps_shape_and_dtype_and_goes_downhill(
    name: str, settings: dict[str, Any], dims: tuple[int, ...], dtype: torch.dtype
) -> None:
    inverter = made(name, settings)
    found = invert_with_ladder(
        inverter, statistics(inverter, dims, dtype), damping=1.0, previous={}, seed=SEED
    ).preconditioner
    assert isinstance(found, inverter.produces)
    shape = BlockShape.of_tensors(dims, C)
    assert found.shape == (C, shape.d_out, shape.d_in)
    assert {each.dtype for each in tensor_fields(found).values()} == {dtype}
    V = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    for U in (found.apply(V, 1.0), found.fallback(V, 1.0)):
        assert (U.dtype, U.shape) == (dtype, V.shape)
        assert (U * V).sum((1, 2)).min() > 0
    assert sum(each.numel() for each in tensor_fields(found).values()) <= C * inverter.estimate(shape).numbers + 8 * (
        C + sum(dims)
    )


@over_methods
@over_shapes
def test_travels_whole_and_depends_on_its_job_alone(name: str, settings: dict[str, Any], dims: tuple[int, ...]) -> None:
    inverter, results = made(name, settings), []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        record = statistics(inverter, dims, torch.float32)
        job = encode_job(
            inverter=inverter, statistics={"b": record}, damping=1.0, seeds={"b": SEED}, previous={}, threads=1
        )
        results.append(run_job(job))
    assert results[0] == results[1]
    direct = invert_with_ladder(
        inverter, statistics(inverter, dims, torch.float32), damping=1.0, previous={}, seed=SEED
    ).preconditioner
    outcomes = decode_result(results[0]).outcomes
    arrived = outcomes["b"].preconditioner
    assert direct is not None and arrived is not None
    assert encode_result({"b": arrived}, outcomes) == results[0]
    expected, found = tensor_fields(direct), tensor_fields(arrived)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each], expected[each]) for each in expected)


@over_methods
@pytest.mark.parametrize("bad", ["nan", "inf", "asymmetric", "negative"])
def test_says_what_is_wrong_with_bad_sums(name: str, settings: dict[str, Any], bad: str) -> None:
    inverter = made(name, settings)
    record = statistics(inverter, (3, 4), torch.float32)
    spoiled = record.mode_2.clone()
    if bad == "asymmetric":
        spoiled[0, 0, 1] += 10.0
    else:
        spoiled[0, 1, 1] = {"nan": torch.nan, "inf": torch.inf, "negative": -1.0}[bad]
    found = invert_with_ladder(inverter, replace(record, mode_2=spoiled), damping=1.0, previous={}, seed=SEED)
    assert found.outcome is Outcome.FAILED and "factor mode_2" in found.reason


@over_methods
def test_its_settings_make_it_again_and_its_cost_grows(name: str, settings: dict[str, Any]) -> None:
    inverter = made(name, settings)
    written = json.loads(json.dumps(inverter.settings()))
    assert make_inverter(inverter.name, **written) == inverter
    assert written.keys() == {field.name for field in fields(inverter)}
    costs = [inverter.cost(BlockShape.of_tensors((d, d, 3))) for d in (64, 512)]
    assert 0 < costs[0] < costs[1]


@over_methods
@over_shapes
def test_a_step_reads_no_value_back_to_the_host(
    name: str, settings: dict[str, Any], dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have no values: folding, applying, learning and a change of basis pass on them, as on a GPU."""
    monkeypatch.setattr(adam_moments, "is_at_hand", lambda _weight: False)
    inverter = made(name, settings)
    record = statistics(inverter, dims, torch.float32)
    found = invert_with_ladder(inverter, record, damping=1.0, previous={}, seed=SEED).preconditioner
    assert found is not None
    shape, mode = BlockShape.of_tensors(dims, C), FakeTensorMode()
    fake, other = (map_tensors(mode.from_tensor, found) for _ in range(2))
    with mode:
        sums = GradientSums(sum_shapes(shape, inverter.needs(shape)), C, dtype=torch.float32, device="cpu")
        gradient = torch.zeros(fake.shape)
        for finite in (None, torch.tensor(True)):
            memory = BlockMemory(learns=True if finite is None else finite)
            assert fake.apply(gradient, 1.0, memory).shape == gradient.shape
            sums.fold(inverter.moments(as_tensors(gradient, dims), fake, memory), inverter.decay(0.9), finite)
            other.take_over(fake, memory)
            assert other.apply(gradient, 1.0, memory).shape == gradient.shape
        assert sums.packed().keys() == {*MODES, "weight"}
