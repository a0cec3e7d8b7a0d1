"""Stopped and resumed runs: bit for bit at the same number of ranks, to rounding at another one."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.config import load_config
from kfdist.errors import LossNotFinite
from kfdist.forecast.checkpoint_size import checkpoint_bytes
from kfdist.runtime.invert import service
from kfdist.training import checkpoint
from tests.support.faults import Faults
from tests.support.faulty.link import FaultyLink
from tests.support.training import FIXED_LAG, SMALL, Stop, checkpoint_states, events, parameters, train


@dataclass(frozen=True)
class Whole:
    directory: Path
    summary: dict[str, Any]


STEPS = 32
"""Of the runs below that are resumed: after their stops each block is measured, shipped and adopted once more."""

# State that only a rank has: generators (dropout) and averages (batch norm).
NOISY = ("model.settings.batch_norm=true", "model.settings.dropout=0.2", f"run.steps={STEPS}")


def assert_equal_on_all_ranks(*summaries: dict[str, Any]) -> None:
    digests = {digest for summary in summaries for digest in summary["parameter_sha256"]}
    assert len(digests) == 1, [summary["parameter_sha256"] for summary in summaries]


def in_flight(directory: Path) -> int:
    return sum(len(state["preconditioner"]["in_flight"]) for state in checkpoint_states(directory))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The uninterrupted run, on three ranks: from so many on, the order of sums matters."""
    directory = tmp_path_factory.mktemp("whole")
    return Whole(directory=directory, summary=train(directory, *FIXED_LAG, *NOISY, ranks=3))


def test_fixed_lag_stopped_by_schedule_and_resumed_is_bitwise_the_uninterrupted_run(tmp_path: Path, whole: Whole):
    half = train(tmp_path, *FIXED_LAG, *NOISY, "run.steps=19", ranks=3)
    assert (half["status"], half["steps"], half["codes"]) == ("finished", 19, [0] * 3)
    assert in_flight(tmp_path) > 0, "the stop must fall between a version's shipping and its adoption"
    rest = train(tmp_path, *FIXED_LAG, *NOISY, ranks=3)
    assert (rest["status"], rest["steps"], rest["codes"]) == ("finished", STEPS, [0] * 3)
    assert [line["step"] for line in events(tmp_path, "start")] == [0, 19]
    assert_equal_on_all_ranks(whole.summary, rest)
    assert rest["metrics"]["test_loss"] == whole.summary["metrics"]["test_loss"]
    losses = [[line["loss"] for line in events(path, "step")] for path in (whole.directory, tmp_path)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_fixed_lag_stopped_by_sigterm_to_one_rank_and_resumed_is_bitwise_the_uninterrupted_run(
    tmp_path: Path, whole: Whole
):
    stopped = train(tmp_path, *FIXED_LAG, *NOISY, ranks=3, stop=Stop(step=12, worker_rank=2))
    assert (stopped["status"], stopped["codes"]) == ("stopped", [75] * 3)
    # Between two steps or inside an agreed wait, wherever it came.
    assert stopped["stop_reason"].startswith("the run was asked to stop")
    assert 12 <= stopped["steps"] < STEPS
    assert_equal_on_all_ranks(stopped)
    rest = train(tmp_path, *FIXED_LAG, *NOISY, ranks=3)
    assert (rest["steps"], rest["codes"]) == (STEPS, [0] * 3)
    assert_equal_on_all_ranks(whole.summary, rest)


def use_faulty_links(worker_rank: int) -> None:
    del worker_rank
    service.LocalLink = FaultyLink  # type: ignore[misc, assignment]


@pytest.mark.parametrize(
    ("stop", "overrides", "reason"),
    [
        (Stop(step=13, worker_rank=1), (), "asked to stop while it waited"),
        pytest.param(
            None,
            ("preconditioner.wait_limit_seconds=2",),
            "outlasted wait_limit_seconds",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["signal", "wait limit"],
)
def test_a_run_stopped_inside_an_agreed_wait_does_that_step_again(
    tmp_path: Path, whole: Whole, faults: Faults, stop: Stop | None, overrides: tuple[str, ...], reason: str
):
    faults.at(version=range(8, sys.maxsize)).withhold()
    # Version 8 is awaited at step 13: 13 steps are done, the next one has measured its batch but not moved.
    stuck = train(tmp_path, *FIXED_LAG, *NOISY, *overrides, ranks=3, stop=stop, prepare=use_faulty_links)
    assert (stuck["codes"], stuck["status"], stuck["steps"]) == ([75] * 3, "stopped", 13)
    assert reason in stuck["stop_reason"]
    rest = train(tmp_path, *FIXED_LAG, *NOISY, ranks=3)
    assert_equal_on_all_ranks(whole.summary, rest)


def test_periodic_checkpoints_do_not_change_a_bit(tmp_path: Path, whole: Whole):
    often = train(tmp_path, *FIXED_LAG, *NOISY, "checkpoint.period=3", ranks=3)
    assert_equal_on_all_ranks(whole.summary, often)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize("precision", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_lower_precision_learns_and_resumes_with_the_scale_of_its_loss(tmp_path: Path, precision: str):
    common = (*FIXED_LAG, f"run.precision={precision}")
    whole = train(tmp_path / "whole", *common, ranks=2)
    train(tmp_path / "halves", *common, "run.steps=19", ranks=2)
    rest = train(tmp_path / "halves", *common, ranks=2)
    assert_equal_on_all_ranks(whole, rest)
    assert rest["metrics"]["train_loss"] < 0.5 * events(tmp_path / "whole", "step")[0]["loss"]


def test_targets_drawn_from_the_model_are_drawn_alike_after_a_resume(tmp_path: Path):
    common = (*FIXED_LAG, "preconditioner.fisher=mc", "run.precision=float16")
    whole = train(tmp_path / "whole", *common, ranks=2)
    train(tmp_path / "halves", *common, "run.steps=19", ranks=2)
    rest = train(tmp_path / "halves", *common, ranks=2)
    assert_equal_on_all_ranks(whole, rest)
    empirical = train(tmp_path / "empirical", *FIXED_LAG, "run.precision=float16", ranks=2)
    assert empirical["parameter_sha256"] != whole["parameter_sha256"]


@pytest.mark.parametrize(
    ("statistics", "before", "after"),
    [
        ("folded", 4, 2),
        pytest.param("per-rank", 2, 3, marks=pytest.mark.slow),
        pytest.param("per-rank", 4, 2, marks=pytest.mark.slow),
        pytest.param("folded", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on_equal_to_rounding(tmp_path: Path, statistics: str, before: int, after: int):
    # The same global batch, and a method without random choices, so that only the order of sums differs.
    total = 24
    common = (
        *FIXED_LAG,
        "preconditioner.method=kfac",
        f"checkpoint.statistics={statistics}",
        "run.accept_changes=true",
    )
    old, new = f"data.batch_size={total // before}", f"data.batch_size={total // after}"
    whole = train(tmp_path / "whole", *common, old, ranks=before)
    train(tmp_path / "halves", *common, old, "run.steps=19", ranks=before)
    assert in_flight(tmp_path / "halves") > 0
    middle = parameters(tmp_path / "halves")
    rest = train(tmp_path / "halves", *common, new, ranks=after)
    assert (rest["world_size"], rest["steps"], rest["codes"]) == (after, 40, [0] * after)
    assert_equal_on_all_ranks(rest)
    one, two = parameters(tmp_path / "whole"), parameters(tmp_path / "halves")
    # float32 rounds at 1e-7; 21 steps through damped inverses (1 / lambda = 100) amplify that to well under 1e-3.
    assert (one - two).norm() < 1e-3 * (one - middle).norm()
    assert rest["metrics"]["test_accuracy"] == pytest.approx(whole["metrics"]["test_accuracy"], abs=0.01)


def test_asap_resumes_too(tmp_path: Path):
    half = train(tmp_path, *NOISY, ranks=2, stop=Stop(step=12, number=signal.SIGINT))
    assert half["codes"] == [75, 75]
    rest = train(tmp_path, *NOISY, ranks=2)
    assert (rest["codes"], rest["steps"]) == ([0, 0], STEPS)
    assert_equal_on_all_ranks(rest)


def test_folded_checkpoints_are_smaller(tmp_path: Path):
    sizes = {}
    for statistics in ("per-rank", "folded"):
        train(tmp_path / statistics, *FIXED_LAG, f"checkpoint.statistics={statistics}", "run.steps=9", ranks=4)
        newest = max((tmp_path / statistics / "checkpoints").iterdir())
        sizes[statistics] = sum(path.stat().st_size for path in newest.iterdir())
    assert sizes["folded"] < 0.8 * sizes["per-rank"]


def test_folded_checkpoints_have_gradients_moments_once_and_are_as_large_as_foretold(tmp_path: Path):
    method = ("preconditioner.method=shampoo", "preconditioner.settings={}", *FIXED_LAG[:1], "preconditioner.lag=0")
    optimizer = ("optimizer.name=kfdist", "optimizer.lr=0.001", "model.settings.hidden=[96, 64]")
    common = (*method, *optimizer, "checkpoint.statistics=folded", "cluster.workers=2")
    whole = train(tmp_path / "whole", *common, ranks=2)
    train(tmp_path / "halves", *common, "run.steps=16", ranks=2)
    assert all("moments" not in state["preconditioner"] for state in checkpoint_states(tmp_path / "halves"))
    newest = max((tmp_path / "halves" / "checkpoints").iterdir())
    (tmp_path / "run.toml").write_text(SMALL)
    foretold = checkpoint_bytes(load_config(tmp_path / "run.toml", environment={}, overrides=common))
    assert foretold == pytest.approx(sum(path.stat().st_size for path in newest.iterdir()), rel=0.15)
    rest = train(tmp_path / "halves", *common, ranks=2)
    assert_equal_on_all_ranks(whole, rest)
    fewer = train(tmp_path / "whole", *common, "run.steps=42", "run.accept_changes=true", ranks=1)
    assert (fewer["steps"], fewer["codes"]) == (42, [0])


def test_a_run_by_the_default_optimizer_and_method_resumes_bit_for_bit_also_between_two_bases(tmp_path: Path):
    method = ("preconditioner.method=by-width", "preconditioner.settings={dense='ekfac-adam'}", *FIXED_LAG)
    common = (*method, "optimizer.name=kfdist", "optimizer.lr=0.003", "optimizer.warmup_steps=9")
    whole = train(tmp_path / "whole", *common, ranks=2)
    train(tmp_path / "halves", *common, "run.steps=19", ranks=2)
    rest = train(tmp_path / "halves", *common, ranks=2)
    assert rest["inversions"]["by_method"].keys() == {"ekfac-adam"}
    assert_equal_on_all_ranks(whole, rest)


def look_who_encodes(worker_rank: int) -> None:
    save = checkpoint.CheckpointStore.save

    def looking(store: checkpoint.CheckpointStore, shared: Any, own: Any, **said: Any) -> Any:
        assert bool(shared["preconditioner"]["snapshots"]) == (worker_rank == 0)
        assert "snapshots" not in own["preconditioner"]
        assert "preconditioner" not in shared["optimizer"]
        return save(store, shared, own, **said)

    checkpoint.CheckpointStore.save = looking  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("optimizer.name=kfdist", "optimizer.lr=0.003", "preconditioner.kl_clip=0"),
    ],
)
def test_snapshots_are_encoded_by_the_rank_alone_that_writes_them(tmp_path: Path, optimizer: tuple[str, ...]):
    whole = train(tmp_path / "whole", *FIXED_LAG, *optimizer, ranks=2)
    train(tmp_path / "halves", *FIXED_LAG, *optimizer, "run.steps=19", ranks=2, prepare=look_who_encodes)
    assert_equal_on_all_ranks(whole, train(tmp_path / "halves", *FIXED_LAG, *optimizer, ranks=2))


def lose_the_disk_of_rank_1(worker_rank: int) -> None:
    if worker_rank != 1:
        return
    write = checkpoint.write_file

    def failing(path: Path, content: bytes) -> None:
        if "step-00000020" in str(path):
            raise OSError(28, "No space left on device")
        write(path, content)

    checkpoint.write_file = failing


def test_a_fault_on_one_ranks_disk_is_told_and_training_goes_on(tmp_path: Path):
    summary = train(tmp_path, "checkpoint.period=10", "checkpoint.keep=9", ranks=3, prepare=lose_the_disk_of_rank_1)
    assert (summary["status"], summary["checkpoint_faults"], summary["codes"]) == ("finished", 1, [0] * 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000030",
        "step-00000040",
    ]
    faults = {line["step"]: line["fault"] for line in events(tmp_path, "checkpoint")}
    assert faults == {10: "", 20: "rank 1: [Errno 28] No space left on device", 30: "", 40: ""}
    assert summary["unsaved_steps"] == 0


def test_a_run_whose_last_checkpoint_was_not_written_is_finished_by_another_start(tmp_path: Path):
    common = ("run.steps=20", "checkpoint.period=10")
    lost = train(tmp_path, *common, ranks=2, prepare=lose_the_disk_of_rank_1)
    assert (lost["status"], lost["steps"], lost["unsaved_steps"], lost["codes"]) == ("finished", 20, 10, [0] * 2)
    found = train(tmp_path, *common, ranks=2)
    assert (found["start"], found["unsaved_steps"], found["codes"]) == (2, 0, [0] * 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
    assert train(tmp_path, *common, ranks=2)["start"] == 2  # now it is done


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("kfac", r"damping 0\.\d+\); lower optimizer\.lr or raise preconditioner\.damping, and"),
        ("none", r"learning rate 1e\+30\); lower optimizer\.lr, and"),
    ],
)
def test_a_loss_that_is_not_finite_stops_all_ranks_before_it_reaches_a_checkpoint(
    tmp_path: Path, method: str, told: str
):
    overrides = (f"preconditioner.method={method}", "preconditioner.kl_clip=0", "optimizer.lr=1e30")
    found = rf"{LossNotFinite.__name__}: the training loss is (nan|inf) in the 5 steps up to .*{told}"
    with pytest.raises(AssertionError, match=found):
        train(tmp_path, *overrides, "run.log_period=7", "checkpoint.period=5", ranks=2)
    assert not (tmp_path / "checkpoints").exists() or not list((tmp_path / "checkpoints").iterdir())


def test_without_second_order_method_ranks_still_agree_on_a_stop(tmp_path: Path):
    whole = train(tmp_path / "whole", "preconditioner.method=none", *NOISY, ranks=2)
    half = train(tmp_path / "halves", "preconditioner.method=none", *NOISY, ranks=2, stop=Stop(step=12, worker_rank=1))
    assert half["codes"] == [75, 75]
    rest = train(tmp_path / "halves", "preconditioner.method=none", *NOISY, ranks=2)
    assert_equal_on_all_ranks(whole, rest)
    assert rest["inversions"] == {"completed": 0, "failed": 0, "by_method": {}}


def test_a_run_in_epochs_ends_where_they_end_and_can_be_prolonged(tmp_path: Path):
    # 200 examples in steps of 2 x 8: 12 steps an epoch.
    first = train(tmp_path, "run.epochs=2", ranks=2)
    assert (first["steps"], first["data_epochs"]) == (24, 2)
    assert [line["epoch"] for line in events(tmp_path, "epoch")] == [1, 2]
    again = train(tmp_path, "run.epochs=3", ranks=2)
    assert (again["steps"], again["data_epochs"]) == (36, 3)


def test_a_summary_has_what_it_promises(tmp_path: Path):
    summary = train(tmp_path, ranks=2)
    assert summary["status"] == "finished"
    assert summary["steps"] == 40
    assert summary["seconds"] > 0
    assert 0 <= summary["metrics"]["test_accuracy"] <= 1
    assert 0 < summary["step_seconds"]["p50"] <= summary["step_seconds"]["p99"]
    assert 8 <= summary["staleness_steps"]["max"]
    # Three layers: version 0 each, then every 8 steps.
    completed = summary["inversions"]["completed"]
    assert summary["inversions"] == {"completed": completed, "failed": 0, "by_method": {"rs-kfac": completed}}
    assert completed >= 3 * 4
    assert summary["owner_restarts"] == 0
    assert summary["rank_modules_clean"] is True
    assert {"gradients", "statistics", "jobs", "results", "snapshots"} <= set(summary["bytes"])
    assert len(summary["parameter_sha256"]) == 2
    assert summary["versions"]["torch"] == torch.__version__


def test_a_finished_run_started_again_does_nothing(tmp_path: Path):
    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    train(tmp_path, ranks=2)
    before = contents()
    assert train(tmp_path, ranks=2)["codes"] == [0, 0]
    assert contents() == before
