"""What the Brand family asks for, how its jobs follow one another, and what it never holds."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import chain_jobs, decode_result, encode_job, job_after, run_job
from kfdist.curvature.statistics import Increment
from kfdist.errors import ConfigError
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from tests.support.increments import folding_sequence, run_chain
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian
from tests.support.tiers import in_turn

BOTH = frozenset({"A", "G"})
METHODS = ["b-kfac", "b-r-kfac", "b-kfac-c"]
SETTINGS: dict[str, Any] = {"rank": 8, "increment_rows": 6, "oversampling": 4}


@pytest.mark.parametrize(
    ("shape", "updated", "note"),
    [
        (BlockShape(d_out=512, d_in=513), {"A", "G"}, "Brand on A and G"),
        (BlockShape(d_out=476, d_in=477), {"A"}, "Brand on A, randomised SVD on G"),
        (BlockShape(d_out=2048, d_in=65), {"G"}, "Brand on G, randomised SVD on A"),
        (BlockShape(d_out=10, d_in=65), set(), "randomised SVD on A and G"),
        (BlockShape(d_out=512, d_in=4608, convolution=True), set(), "randomised SVD on A and G"),
    ],
)
def test_brand_takes_the_factors_with_rank_and_rows_below_their_size(
    shape: BlockShape, updated: set[str], note: str
) -> None:
    """r + n = 220 + 256 = 476 < d, Linear only; b-kfac has no dense sum of what Brand takes."""
    for method in METHODS:
        inverter = make_inverter(method)
        needs = inverter.needs(shape)
        assert needs.increments == updated
        assert needs.increment_rows == (256 if updated else 0)
        assert needs.sums == (BOTH - updated if method == "b-kfac" else BOTH)
        assert inverter.note(shape) == note


def test_without_a_correction_nothing_dense_is_asked_for() -> None:
    shape = BlockShape(d_out=512, d_in=513)
    assert make_inverter("b-kfac-c", correction_fraction=0.0).needs(shape) == make_inverter("b-kfac").needs(shape)


def test_an_adaptive_rank_needs_room_for_its_largest() -> None:
    shape = BlockShape(d_out=756, d_in=757)
    assert make_inverter("b-kfac", adaptive_rank=True).needs(shape).increments == {"A"}


def test_the_update_period_fits_between_the_two_others() -> None:
    assert make_inverter("b-kfac").update_period(10, 100) == 10
    assert make_inverter("b-r-kfac", brand_period=50).update_period(10, 100) == 50
    for period in (5, 15, 30, 200):
        with pytest.raises(ConfigError, match=rf"brand_period: {period} is not allowed; .*\(10\).*\(100\)"):
            make_inverter("b-kfac", brand_period=period).update_period(10, 100)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("b-kfac", {"rank": 0}, "rank: 0"),
        ("b-kfac", {"increment_rows": 0}, "increment_rows: 0"),
        ("b-kfac", {"truncate": "never"}, "truncate: 'never' is not allowed; choose one of 'before', 'after'"),
        ("b-kfac", {"brand_period": 0}, "brand_period: 0"),
        ("b-kfac", {"damping_rule": "exact"}, "damping_rule: 'exact'"),
        ("b-kfac", {"adaptive_rank": 1}, "adaptive_rank: 1 is not allowed; must be true or false"),
        (
            "b-kfac",
            {"adaptive_rank": True, "rank": 60},
            "rank: 60 is not allowed with adaptive_rank; must be from 70 to",
        ),
        ("b-kfac", {"correction_fraction": 0.5}, "b-kfac has no setting 'correction_fraction'"),
        (
            "b-kfac-c",
            {"correction_fraction": 1.5},
            "correction_fraction: 1.5 is not allowed; must be a number of at",
        ),
        ("b-kfac-c", {"correction_fraction": True}, "correction_fraction: True"),
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_inverter(name, **settings)


def test_each_costs_more_than_the_one_before_it_and_b_kfac_grows_linearly() -> None:
    shape, wider = BlockShape(d_out=4096, d_in=4096), BlockShape(d_out=8192, d_in=8192)
    b_kfac, corrected, overwritten = (make_inverter(name) for name in ("b-kfac", "b-kfac-c", "b-r-kfac"))
    assert b_kfac.cost(shape) < corrected.cost(shape) < overwritten.cost(shape)
    assert b_kfac.cost(wider) < 2 * b_kfac.cost(shape)
    assert b_kfac.cost(BlockShape(d_out=4096, d_in=4096, convolution=True)) == make_inverter("rs-kfac").cost(shape)


def payloads(method: str, increments: list[Increment]) -> list[bytes]:
    inverter = make_inverter(method, **SETTINGS)
    return [
        encode_job(inverter=inverter, statistics={"fc": each}, damping=1e-2, seeds={"fc": 5}, previous={}, threads=1)
        for each in increments
    ]


def one_by_one(jobs: list[bytes]) -> bytes:
    result = run_job(jobs[0])
    for job in jobs[1:]:
        # An owner dies after the work and before its answer: the next one does the same job again.
        complete = job_after(job, result)
        lost, result = run_job(complete), run_job(complete)
        assert lost == result
    return result


@pytest.mark.parametrize(("method", "dtype"), in_turn(METHODS, [torch.float32, torch.float64], of=2))
def test_a_chain_of_jobs_equals_one_pass_bit_for_bit(method: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    make: dict[str, Any] = {"q": 60, "p": 50, "room": 6, "dense_at": lambda k: k % 3 == 0, "dtype": dtype}
    increments, _ = folding_sequence([6, 3, 6, 0, 5, 6], **make)
    jobs = payloads(method, increments)
    result = one_by_one(jobs)
    assert run_job(chain_jobs(jobs)) == result
    outcome = decode_result(result).outcomes["fc"]
    direct = run_chain(method, increments, **SETTINGS)[-1]
    expected, found = tensor_fields(direct.preconditioner), tensor_fields(outcome.preconditioner)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(outcome.state[name], direct.state[name]) for name in direct.state)


def test_the_order_of_the_increments_and_each_single_one_matter() -> None:
    increments, _ = folding_sequence([6, 3, 6, 5], q=60, p=50, room=6, dense_at=lambda k: False)
    jobs = payloads("b-kfac", increments)
    result = one_by_one(jobs)
    assert one_by_one([jobs[1], jobs[0], *jobs[2:]]) != result
    assert one_by_one(jobs[:3]) != result
    assert one_by_one([*jobs, jobs[-1]]) != result


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that an operator makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


def test_b_kfac_never_holds_a_dense_factor() -> None:
    """Through the ladder, over two jobs: no tensor is larger than U with its new columns, 128 000 numbers for A."""
    q, p, r, n = 8_000, 5_000, 8, 8
    inverter = make_inverter("b-kfac", rank=r, increment_rows=n)
    assert inverter.needs(BlockShape(d_out=p, d_in=q)).sums == frozenset()
    state: dict[str, Tensor] = {}
    with LargestTensor() as watched:
        for seed in (0, 2):
            increment = Increment(
                A_rows=gaussian(1, n, q, seed=seed).float(),
                G_rows=gaussian(1, n, p, seed=seed + 1).float(),
                examples=torch.tensor(8.0),
                positions=torch.tensor(8.0),
                decay=torch.tensor(0.5),
                A=torch.zeros(1, 0, 0),
                G=torch.zeros(1, 0, 0),
            )
            outcome = invert_with_ladder(inverter, increment, damping=1e-2, previous=state, seed=1)
            state = dict(outcome.state)
    assert outcome.preconditioner is not None, outcome.reason
    assert 0 < watched.numbers <= q * (r + n)
    held = [*state.values(), *tensor_fields(outcome.preconditioner).values()]
    assert sum(tensor.numel() for tensor in held) <= 2 * (p + q) * (r + n) + 200
