"""Jobs and results as bytes: what goes in comes out, and a malformed payload is refused with a sentence."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save

from kfdist.curvature.inverter import Outcome
from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import (
    NO_STATISTICS,
    chain_jobs,
    decode_result,
    encode_job,
    failure_result,
    job_after,
    job_bytes,
    job_threads,
    run_job,
)
from kfdist.curvature.statistics import Increment, KroneckerFactors, Needs
from kfdist.types import BlockShape
from kfdist.wire.records import tensor_fields
from kfdist.wire.tree import pack, unpack
from tests.support.matrices import C, P, Q, gaussian, make_factors


def job(**changes: Any) -> bytes:
    arguments: dict[str, Any] = {
        "inverter": make_inverter("rs-kfac", rank=3, oversampling=2),
        "statistics": {"conv.1": make_factors("decaying", torch.float32), "a/b.c": make_factors("zero", torch.float32)},
        "damping": 1e-2,
        "seeds": {"conv.1": 7, "a/b.c": 2**62},
        "previous": {"conv.1": {"warm": torch.ones(2, 3)}},
        "threads": 1,
    }
    return encode_job(**{**arguments, **changes})


Edit = Callable[[dict[str, Any]], object]


def edited(payload: bytes, edit: Edit) -> bytes:
    """Returns the payload with its content changed, still a file of this container."""
    tree = unpack(payload)
    edit(tree)
    return pack(tree)


def test_a_group_of_blocks_comes_back_by_name() -> None:
    result = decode_result(run_job(job()))
    assert set(result.outcomes) == {"conv.1", "a/b.c"}
    assert not result.failed and result.reason == ""
    for outcome in result.outcomes.values():
        assert outcome.preconditioner is not None
        assert outcome.preconditioner.shape == (C, P, Q)


def test_a_block_has_the_same_result_alone_and_in_a_group() -> None:
    together = decode_result(run_job(job())).outcomes["conv.1"].preconditioner
    alone = job(statistics={"conv.1": make_factors("decaying", torch.float32)})
    single = decode_result(run_job(alone)).outcomes["conv.1"].preconditioner
    assert together is not None and single is not None
    expected = tensor_fields(single)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensor_fields(together).items())


def test_equal_arguments_give_equal_bytes() -> None:
    assert job(seeds={"a/b.c": 2**62, "conv.1": 7}) == job()
    assert job(seeds={"conv.1": 8, "a/b.c": 9}) != job()


def test_one_failed_block_fails_the_group_and_says_which() -> None:
    factors = {"good": make_factors("decaying", torch.float32), "bad": make_factors("nan", torch.float32)}
    result = decode_result(run_job(job(statistics=factors, seeds={"good": 1, "bad": 2}, previous={})))
    assert result.failed
    assert result.outcomes["good"].outcome is Outcome.DONE
    assert result.outcomes["bad"].preconditioner is None
    assert result.reason.startswith("factor A holds 2 non-finite")


def test_a_failure_without_an_inversion() -> None:
    result = decode_result(failure_result({"x": NO_STATISTICS, "y": NO_STATISTICS}))
    assert result.failed and set(result.outcomes) == {"x", "y"}
    assert result.reason == NO_STATISTICS
    mixed = decode_result(failure_result({"x": NO_STATISTICS, "y": "something else"}))
    assert mixed.reason == f"x: {NO_STATISTICS}; y: something else"


def test_threads_can_be_read_without_the_tensors() -> None:
    assert job_threads(job(threads=3)) == 3


@pytest.mark.parametrize("groups", [1, 16])
def test_the_estimate_of_the_size_is_close(groups: int) -> None:
    A, G = torch.zeros(groups, 145, 145), torch.zeros(groups, 64, 64)
    payload = job(statistics={"conv": KroneckerFactors(A=A, G=G)}, seeds={"conv": 1}, previous={})
    estimate = job_bytes([(BlockShape(d_out=64, d_in=145, groups=groups), Needs())])
    assert estimate == pytest.approx(len(payload), rel=0.02)


def test_the_estimate_adds_up_over_a_group() -> None:
    shapes = [(BlockShape(d_out=3, d_in=4), Needs()), (BlockShape(d_out=5, d_in=6, groups=2), Needs())]
    assert job_bytes(shapes) == job_bytes(shapes[:1]) + job_bytes(shapes[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"damping": 0.0}, "damping: 0.0 is not allowed; must be a finite number above 0"),
        ({"damping": float("nan")}, "damping: nan is not allowed"),
        ({"threads": 0}, "threads: 0 is not allowed; must be a whole number of at least 1"),
        ({"threads": 10**9}, "threads: 1000000000 is not allowed; must be a number of at least 1 and at most 1024"),
        ({"statistics": {}}, "a job needs at least one block"),
        ({"seeds": {"conv.1": 1}}, "block 'a/b.c' has no seed"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def put(path: str, value: Any) -> Edit:
    """Puts a value in a place of the payload, such as "blocks.0.seed"."""

    def edit(tree: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = tree
        for key in parents:
            target = target[int(key)] if isinstance(target, list) else target[key]
        target[last] = value

    return edit


def rename_a_field(tree: dict[str, Any]) -> None:
    values = tree["blocks"][0]["statistics"]["fields"]
    values["X"] = values.pop("G")


FIRST = "blocks.0.statistics"
MALFORMED: dict[str, tuple[Edit, str]] = {
    "format": (put("format", 99), "must be a job of format 3"),
    "content": (put("content", "result"), "must be a job of format 3"),
    "damping": (put("damping", "much"), "damping: 'much' is not allowed"),
    "damping-bool": (put("damping", True), "damping: True is not allowed"),
    "damping-tensor": (put("damping", torch.ones(1)), "damping: tensor.* is not allowed"),
    "threads": (put("threads", 1.5), "threads: 1.5 is not allowed"),
    "too many threads": (put("threads", 10**9), "threads: 1000000000 is not allowed"),
    "method": (put("inverter.name", "rs-kfak"), "did you mean 'rs-kfac'"),
    "setting": (put("inverter.settings", {"rang": 3}), "did you mean 'rank'"),
    "setting-value": (put("inverter.settings", {"rank": -3}), "rank: -3 is not allowed"),
    "inverter": (put("inverter", None), "inverter is None, must have a name and settings"),
    "part": (put("more", 1), "the job has parts that nobody reads: more; known: blocks, damping"),
    "no-blocks": (put("blocks", []), "must be a list with at least one entry"),
    "blocks": (put("blocks", {}), "must be a list with at least one entry"),
    "nameless": (put("blocks", [{}]), "must have a name"),
    "twice": (lambda tree: tree["blocks"].append(tree["blocks"][0]), "is in the payload twice"),
    "seed": (put("blocks.0.seed", "x"), "'x' is not allowed; must be a whole number"),
    "statistics": (put(FIRST, None), "block 'conv.1': statistics: None is no record; it must have a kind and fields"),
    "statistics-kind": (put(f"{FIRST}.kind", "rows"), "unknown record 'rows'; known: kronecker-factors"),
    "missing": (rename_a_field, "lacks its field 'G'"),
    "left-over": (put(f"{FIRST}.fields.H", torch.ones(3)), "has no fields H"),
    "unclaimed": (put("blocks.0.rows", torch.ones(3)), "block 'conv.1' has parts that nobody reads: rows"),
    "no-tensor": (put(f"{FIRST}.fields.A", 1.0), "field 'A' of kronecker-factors is 1.0; it must be a tensor"),
    "triangle": (put(f"{FIRST}.fields.A", torch.ones(2, 5)), "5 numbers are no triangle"),
    "dimensions": (put(f"{FIRST}.fields.A", torch.ones(6)), "must be"),
    "groups": (put(f"{FIRST}.fields.A", torch.ones(3, 6)), "factor A has 3 groups, G has 2"),
    "integers": (
        put(f"{FIRST}.fields.A", torch.ones(2, 6, dtype=torch.int64)),
        "factor A is torch.int64, must be floating-point",
    ),
    "previous": (put("blocks.0.previous", [torch.ones(1)]), "previous is .tensor.*, must be tensors by name"),
    "previous-number": (put("blocks.0.previous.warm", 3), "must be tensors by name"),
}


@pytest.mark.parametrize(("edit", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_job_is_refused_with_a_sentence(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_job(edited(job(), edit))


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_torn_payload_is_refused(size: int) -> None:
    for payload, read in ((job(), run_job), (run_job(job()), decode_result)):
        with pytest.raises(ValueError, match="the payload"):
            read(payload[:size])


@pytest.mark.parametrize("payload", [b"x" * 64, (2**60).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0{}"])
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match="no kfdist job"):
        run_job(payload)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("blocks.0.outcome", "great"), "unknown outcome 'great'"),
        (put("blocks.0.outcome", ["done"]), "unknown outcome"),
        (put("blocks.0.preconditioner", None), "block 'conv.1': preconditioner: None is no record"),
        (put("blocks.0.preconditioner.kind", "os.system"), "unknown record 'os.system'"),
        (put("blocks.0.preconditioner.fields.damping_rule", "none"), "damping_rule of .* is 'none', must be one of pi"),
        (put("blocks.0.diagnostics.rung", "high"), "diagnostics is .*, must be finite numbers by name"),
        (put("blocks.0.diagnostics", None), "diagnostics is None, must be finite numbers by name"),
        (put("blocks.0.state", None), "state is None, must be tensors by name"),
        (put("content", "job"), "must be a result of format 3"),
    ],
)
def test_a_malformed_result_is_refused_with_a_sentence(edit: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_result(edited(run_job(job()), edit))


def increments(count: int) -> list[bytes]:
    """Jobs of an online method on one block, each with rows of its own."""
    eligible = {"inverter": make_inverter("b-kfac", rank=2, increment_rows=3), "seeds": {"fc": 1}, "previous": {}}
    return [job(**eligible, statistics={"fc": increment(seed)}) for seed in range(count)]


def increment(seed: int) -> Increment:
    absent = torch.zeros(1, 0, 0)
    return Increment(
        A_rows=gaussian(1, 3, 12, seed=seed).float(),
        G_rows=gaussian(1, 3, 7, seed=seed + 100).float(),
        examples=torch.tensor(3.0),
        positions=torch.tensor(3.0),
        decay=torch.tensor(0.9 if seed else 0.0),
        A=absent,
        G=absent,
    )


def test_a_chain_of_jobs_equals_them_one_by_one_bit_for_bit() -> None:
    jobs = increments(4)
    one_by_one = run_job(jobs[0])
    for each in jobs[1:]:
        one_by_one = run_job(job_after(each, one_by_one))
    assert run_job(chain_jobs(jobs)) == one_by_one
    assert run_job(chain_jobs([chain_jobs(jobs[:2]), *jobs[2:]])) == one_by_one
    assert run_job(job_after(chain_jobs(jobs[1:]), run_job(jobs[0]))) == one_by_one
    assert run_job(chain_jobs([*jobs[:2], *jobs[3:]])) != one_by_one
    assert job_threads(chain_jobs(jobs)) == 1
    assert chain_jobs(jobs[:1]) == jobs[0]


def test_a_failed_link_passes_on_the_state_before_it() -> None:
    jobs = increments(3)
    spoiled = increment(1)
    spoiled.A_rows[0, 0, 0] = torch.nan
    arguments = {"inverter": make_inverter("b-kfac", rank=2, increment_rows=3), "seeds": {"fc": 1}, "previous": {}}
    bad = job(**arguments, statistics={"fc": spoiled})
    failed = run_job(chain_jobs([jobs[0], bad]))
    assert decode_result(failed).failed
    assert run_job(job_after(jobs[2], failed)) == run_job(job_after(jobs[2], run_job(jobs[0])))


@pytest.mark.parametrize("jobs", [None, [], [3], "text"])
def test_a_torn_chain_is_refused(jobs: object) -> None:
    chain = chain_jobs(increments(3))
    with pytest.raises(ValueError, match="must be a list of the bytes of at least one job"):
        run_job(edited(chain, put("jobs", jobs)))
    with pytest.raises(ValueError, match="the chain has parts that nobody reads: blocks"):
        run_job(edited(chain, put("blocks", jobs)))


def test_a_payload_of_the_first_format_is_refused_by_its_number() -> None:
    old = save({"0/statistics/A": torch.ones(1, 3)}, metadata={"kfdist": '{"content": "job", "format": 1}'})
    with pytest.raises(ValueError, match="the payload is {'format': 1, 'content': 'job'}, must be a job of format 3"):
        run_job(old)
