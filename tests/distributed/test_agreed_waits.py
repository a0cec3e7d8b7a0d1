"""What people ask for and how long a wait lasts: every rank obeys, or is interrupted, at the same step."""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest

from kfdist.comm.communicator import Communicator
from kfdist.errors import Interrupted
from kfdist.policies.staleness import Asap, FixedLag
from kfdist.types import Desired, RunSettings
from tests.support.adoption_runs import Record, TrainingRank, check_invariants
from tests.support.faults import Faults
from tests.support.ranks import run_ranks
from tests.support.waits import eventually

STUCK = 8
"""The first version that no owner delivers in the tests of waits."""

WAITS = {"fixed-lag": FixedLag(2), "hard bound": Asap(hard_bound=7)}


@dataclass(frozen=True)
class Interruption:
    """How a rank came out of a wait."""

    reason: str
    step: int
    untouched: bool
    seconds: float


def interrupted(rank: TrainingRank) -> tuple[list[Record], Interruption]:
    """Trains until the wait that nothing ends."""
    records: list[Record] = []
    while True:
        rank.backward()
        before, begun = rank.digest(), time.monotonic()
        try:
            records.append(rank.second_half())
        except Interrupted as interruption:
            untouched = rank.digest() == before
            return records, Interruption(interruption.reason, rank.pre.next_step, untouched, time.monotonic() - begun)


def later(seconds: float, action: Callable[[], None]) -> None:
    threading.Timer(seconds, action).start()


# Stop -----------------------------------------------------------------------------------------------------------------


def asked_to_stop(communicator: Communicator, how: str) -> list[Record]:
    """Rank 1 hears of it after its step 3: by a signal, or because its courier learned of a newer start of the run."""
    rank = TrainingRank(communicator)
    records: list[Record] = []
    while not records or not records[-1].stop:
        records.append(rank.step())
        if records[-1].step == 3 and communicator.rank == 1:
            if how == "signal":
                rank.pre.request_stop()
            else:
                rank.link.wanted = RunSettings(revision=1, desired=Desired.STOPPED)
    rank.close()
    return records


@pytest.mark.parametrize("how", ["signal", "fenced"])
def test_all_ranks_learn_at_the_same_step_that_one_was_asked_to_stop(how: str) -> None:
    ranks = run_ranks(3, asked_to_stop, how)
    check_invariants(ranks)
    # Told in step 4's table, which every rank completes in step 5.
    assert [records[-1].step for records in ranks] == [5] * 3


def stopped_inside_a_wait(communicator: Communicator, wait: str) -> tuple[Interruption, bool]:
    """Rank 1 is asked to stop soon after it told that it waits; says also whether this rank told so."""
    rank = TrainingRank(communicator, adoption=WAITS[wait])

    def ask_to_stop() -> None:
        eventually(lambda: rank.link.told, bool, seconds=60)
        later(0.5, rank.pre.request_stop)  # the others tell it in the same round or the next

    if communicator.rank == 1:
        threading.Thread(target=ask_to_stop, daemon=True).start()
    _, interruption = interrupted(rank)
    with suppress(Interrupted), rank.pre:
        raise Interrupted("as a training script lets it out of its loop", reason=interruption.reason)
    assert "failed" not in [phase for _, phase in rank.link.told]
    return interruption, (interruption.step, "waiting") in rank.link.told


@pytest.mark.parametrize("wait", WAITS)
def test_a_stop_asked_of_one_rank_ends_the_wait_of_all(faults: Faults, wait: str) -> None:
    faults.at(version=range(STUCK, sys.maxsize)).withhold()
    results = run_ranks(3, stopped_inside_a_wait, wait)
    assert {(each.reason, each.untouched) for each, _ in results} == {("stop", True)}
    assert len({each.step for each, _ in results}) == 1
    assert max(each.seconds for each, _ in results) < 20.0
    assert all(told for _, told in results)


# Wait limit -----------------------------------------------------------------------------------------------------------


def goes_on_after_the_limit(communicator: Communicator, withheld: bool) -> tuple[list[Record], Interruption | None]:
    """Once the owners are back, the interrupted step is done again in the same process."""
    if communicator.rank:  # rank 0 judges the time for all: the other's clock is fast
        monotonic = time.monotonic
        time.monotonic = lambda: 100.0 * monotonic()
    rank = TrainingRank(communicator, adoption=FixedLag(2))
    records, interruption = [], None
    if withheld:
        stuck = Faults().at(rank=communicator.rank, version=range(STUCK, sys.maxsize)).withhold()
        records = rank.run(STUCK + 2)
        rank.limit_waits(0.5)
        more, interruption = interrupted(rank)
        stuck.lift()
        rank.limit_waits(600.0)
        records += [*more, rank.second_half()]
    records += rank.run(20)
    rank.close()
    return records, interruption


def test_the_wait_limit_interrupts_all_ranks_and_the_step_can_be_done_again(faults: Faults) -> None:
    del faults  # the ranks schedule and lift their own
    results = run_ranks(2, goes_on_after_the_limit, True)
    check_invariants([records for records, _ in results])
    whole = run_ranks(2, goes_on_after_the_limit, False)
    assert [r.parameters for r in results[0][0]] == [r.parameters for r in whole[0][0]]
    for _, interruption in results:
        assert (interruption.reason, interruption.step, interruption.untouched) == ("wait_limit", STUCK + 2, True)
        assert interruption.seconds >= 0.5


# Settings -------------------------------------------------------------------------------------------------------------


def paused(communicator: Communicator, then: Desired) -> tuple[list[Record], list[tuple[int, str]], float, str]:
    """Rank 0's controller says "paused" after step 3, and something else a second later."""
    rank = TrainingRank(communicator)
    records = [rank.step() for _ in range(4)]
    if communicator.rank == 0:
        rank.link.wanted = RunSettings(revision=3, desired=Desired.PAUSED)
        later(1.0, lambda: setattr(rank.link, "wanted", RunSettings(revision=4, desired=then)))
    begun, reason = time.monotonic(), ""
    try:
        while rank.pre.next_step < 10:
            records.append(rank.step())
    except Interrupted as interruption:
        reason = interruption.reason
    seconds = time.monotonic() - begun
    told = list(rank.link.told)
    rank.close()
    return records, told, seconds, reason


def test_a_paused_run_goes_on_when_told_to() -> None:
    results = run_ranks(2, paused, Desired.RUNNING)
    check_invariants([records for records, *_ in results])
    for records, told, seconds, reason in results:
        assert (records[-1].step, reason) == (9, "")
        assert seconds >= 0.9
        # Told in step 4's table; the pause is before step 5.
        assert told == [(5, "paused"), (5, "running")]


def test_a_paused_run_hears_that_it_is_to_stop() -> None:
    for records, told, seconds, reason in run_ranks(2, paused, Desired.STOPPED):
        assert (records[-1].step, reason) == (4, "stop")
        assert told == [(5, "paused")]
        assert 0.9 <= seconds < 20.0


def paused_inside_a_wait(communicator: Communicator, withheld: bool) -> tuple[list[Record], list[tuple[int, str]]]:
    """The pause takes longer than a wait may, by the clock of rank 0, which judges that."""
    rank = TrainingRank(communicator, adoption=FixedLag(2))
    if withheld:
        stuck = Faults().at(rank=communicator.rank, version=range(STUCK, sys.maxsize)).withhold()
        monotonic = time.monotonic
        time.monotonic = lambda: monotonic() + 10_000.0 * has_told("paused")

        def has_told(phase: str) -> bool:
            return any(told == phase for _, told in list(rank.link.told))

        def command() -> None:
            for phase, revision, then in (("waiting", 3, Desired.PAUSED), ("paused", 4, Desired.RUNNING)):
                while not has_told(phase):
                    time.sleep(0.05)
                if phase == "paused":
                    stuck.lift()
                rank.link.wanted = RunSettings(revision=revision, desired=then)

        threading.Thread(target=command, daemon=True).start()
    records = rank.run(14)
    told = list(rank.link.told)
    rank.close()
    return records, told


def test_a_run_can_be_paused_while_it_waits_and_a_pause_counts_for_nothing_in_the_limit(faults: Faults) -> None:
    del faults  # the ranks schedule and lift their own
    results = run_ranks(2, paused_inside_a_wait, True)
    check_invariants([records for records, _ in results])
    whole = run_ranks(2, paused_inside_a_wait, False)
    assert [r.parameters for r in results[0][0]] == [r.parameters for r in whole[0][0]]
    # Of rank 0, at whose word the pause came; the other may be paused before it has waited long enough to say so.
    assert [phase for step, phase in results[0][1] if step == STUCK + 2][:3] == ["waiting", "paused", "running"]


def damping_set(communicator: Communicator) -> list[Record]:
    """Rank 0's controller says a new damping after step 3; rank 1's own link says another, which nobody asked."""
    rank = TrainingRank(communicator)
    records = [rank.step() for _ in range(4)]
    damping = 0.5 if communicator.rank == 0 else 0.7
    rank.link.wanted = RunSettings(revision=7, changes={"damping": damping})
    records += rank.run(12)
    rank.close()
    return records


def test_damping_set_at_run_time_acts_on_all_ranks_at_the_same_step() -> None:
    ranks = run_ranks(3, damping_set)
    check_invariants(ranks)
    assert [record.damping for record in ranks[0]] == [0.1] * 5 + [0.5] * 7


def everything_set(communicator: Communicator) -> tuple[list[Record], list[tuple[int, int]]]:
    """Under asap, with results that come late, users change the periods and go over to a fixed lag and back."""
    rank = TrainingRank(communicator)
    records = rank.run(5)
    said = [
        {"factor_period": 2, "inverse_period": 4, "kl_clip": 1e-3},
        {"adoption": "fixed-lag", "lag": 2},
        {"adoption": "asap", "lag": None, "soft_bound": 30},
    ]
    for revision, changes in enumerate(said, start=1):
        if communicator.rank == 0:
            rank.link.wanted = RunSettings(revision=revision, changes=changes)
        records += rank.run(len(records) + 9)
    rank.pre.beat("running")
    obeyed = [(each.revision, each.step) for each in rank.link.reported[-1].obeyed] if communicator.rank == 0 else []
    rank.close()
    return records, obeyed


def test_periods_and_adoption_change_on_all_ranks_at_the_same_step() -> None:
    results = run_ranks(3, everything_set)
    check_invariants([records for records, _ in results])
    records, obeyed = results[0]
    # Each in the table started after it was said; the last, under the fixed lag, in a round of a wait.
    assert obeyed == [(1, 6), (2, 15), (3, 23)]
    late = [(record.step, version) for record in records[19:24] for _, version in record.adopted]
    assert late and {step - version for step, version in late} == {2}
    assert any(record.adopted for record in records[26:])


def bad_schedule(communicator: Communicator, name: str) -> tuple[int, str]:
    rank = TrainingRank(communicator, **{name: lambda step: 0.1 if step < 6 else -1.0})
    try:
        rank.run(12)
    except ValueError as error:
        rank.pre.abandon()
        return rank.pre.next_step, str(error)
    return -1, ""


@pytest.mark.parametrize("name", ["damping", pytest.param("kl_clip", marks=pytest.mark.slow)])
def test_a_schedule_gone_wrong_stops_all_ranks_alike(name: str) -> None:
    results = run_ranks(3, bad_schedule, name)
    assert set(results) == {(6, f"the {name} schedule gave -1.0 at step 6; a positive, finite number is needed")}
