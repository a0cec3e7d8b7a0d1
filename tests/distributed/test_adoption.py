"""Adoption over real ranks: whatever is late, delivered twice or damaged, all ranks do the same at the same step."""

import sys
from functools import partial
from typing import Any, get_args

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.curvature.jobs import NO_STATISTICS
from kfdist.errors import EnvironmentFault, RanksDiverged
from kfdist.policies.staleness import Asap, AtHardBound, FixedLag
from kfdist.runtime.plan import planner
from tests.support.adoption_runs import Record, TrainingRank, check_invariants
from tests.support.faults import EACH, Fault, Faults
from tests.support.faulty import broadcasts, inverter
from tests.support.faulty.inverter import Moody
from tests.support.ranks import run_ranks

PERIOD = 4
BOUND = PERIOD + 3
"""What a version that comes a step after its statistics keeps: it is announced, broadcast and agreed on."""


EVERY_FIFTH, EVERY_OTHER = range(0, 2**63, 5), range(0, 2**63, 2)
"""Seeds of inversions."""


def late_results(faults: Faults, *, polls: int, seed: int = 1) -> list[Fault]:
    """Results come late by random numbers of steps, those of every second rank twice."""
    return [
        faults.at(result=EACH).late(polls, seed=seed),
        faults.at(rank=(0, 2), result=EACH).twice(),
        faults.at(poll=EACH).delay(0.0, 0.002),
    ]


# As soon as possible ------------------------------------------------------------------------------------------------


def asap(communicator: Communicator, steps: int, adoption: Asap = Asap()) -> tuple[list[Record], dict[str, Any]]:
    """Also returns the counters."""
    broadcasts.install()
    rank = TrainingRank(communicator, inverse_period=PERIOD, adoption=adoption)
    records, counters = rank.run(steps), rank.pre.counters()
    rank.close()
    return records, counters


def late_everything(faults: Faults, *, polls: int, seed: int) -> None:
    """Late results, and broadcasts that take several steps."""
    late_results(faults, polls=polls, seed=seed)
    faults.at(payload=EACH).late(9, seed=seed)


def check_asap(faults: Faults, seed: int, *, world_size: int, steps: int) -> None:
    late_everything(faults, polls=12, seed=seed)
    results = run_ranks(world_size, asap, steps)
    ranks = [records for records, _ in results]
    check_invariants(ranks)
    assert any(record.overlapping for rank in ranks for record in rank), "no version was announced while one travelled"
    for group in ranks[0][0].versions:
        assert sum(group in dict(record.adopted) for record in ranks[0]) >= 1 + steps // 40


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_asap_ranks_adopt_the_same_versions_at_the_same_steps(faults: Faults, world_size: int) -> None:
    check_asap(faults, world_size, world_size=world_size, steps=40)


def test_asap_replaces_the_waiting_job_and_counts_it(faults: Faults) -> None:
    late_everything(faults, polls=25, seed=7)
    for records, counters in run_ranks(2, asap, 30):
        assert counters["replaced_jobs"] > 0
        assert max(records[-1].versions.values()) > 0


def check_policy(faults: Faults, mode: AtHardBound, seed: int, *, world_size: int, steps: int) -> None:
    adoption = Asap(soft_bound=BOUND, hard_bound=BOUND + 1, at_hard_bound=mode)
    late_everything(faults, polls=20, seed=seed)
    ranks = [records for records, _ in run_ranks(world_size, asap, steps, adoption)]
    check_invariants(ranks)
    in_force = 0
    for record in ranks[0]:
        beyond_soft = sum(staleness > BOUND for staleness in record.staleness.values())
        beyond_hard = sum(staleness > BOUND + 1 for staleness in record.staleness.values())
        assert record.policy.get("damping_raised", 0) == beyond_soft
        if mode == "wait":
            assert beyond_hard == 0
            in_force += record.policy.get("waited", 0)
        else:
            reason = "fallback" if mode == "fallback" else "kept"
            assert record.policy.get(reason, 0) == beyond_hard
            in_force += beyond_hard
    assert in_force > 0, "the delays never reached the bound"


@pytest.mark.parametrize("mode", get_args(AtHardBound))
def test_staleness_keeps_its_bound_or_the_policy_is_counted(faults: Faults, mode: AtHardBound) -> None:
    check_policy(faults, mode, 3, world_size=2, steps=40)


# Fixed lag ------------------------------------------------------------------------------------------------------------

LAG, LAG_PERIOD = 5, 3


def fixed_lag(communicator: Communicator, steps: int) -> list[Record]:
    """An inverter whose results depend on random numbers and on the last version."""
    inverter.install()
    rank = TrainingRank(communicator, method=Moody(), adoption=FixedLag(LAG), inverse_period=LAG_PERIOD)
    records = rank.run(steps)
    rank.close()
    return records


def check_fixed_lag(faults: Faults, seeds: tuple[int, ...], *, steps: int) -> None:
    """One run without delays and one for each seed of delays."""
    faults.at(seed=EVERY_FIFTH).fail("out of mood")
    runs = [run_ranks(3, fixed_lag, steps)]
    for seed in seeds:
        late = late_results(faults, polls=15, seed=seed)
        runs.append(run_ranks(3, fixed_lag, steps))
        for fault in late:
            fault.lift()
    for ranks in runs:
        check_invariants(ranks)
        assert [record.parameters for record in ranks[0]] == [record.parameters for record in runs[0][0]]
        assert [record.payloads for record in ranks[0]] == [record.payloads for record in runs[0][0]]
    most = -(-LAG // LAG_PERIOD) + 1
    for record in runs[0][0]:
        assert max(record.pending.values()) <= most
        assert all(version in (0, record.step - LAG) for _, version in record.adopted)
    assert len({digest for record in runs[0][0] for digest in record.payloads.values()}) > 4 * steps // 10


def test_fixed_lag_is_bitwise_whatever_the_delays(faults: Faults) -> None:
    check_fixed_lag(faults, (1,), steps=30)


def synchronous(communicator: Communicator, one_owner: bool) -> tuple[str, int]:
    """FixedLag(0), with the inversions divided among the ranks or all done by rank 0's process."""
    if one_owner:
        planner.courier_ranks = lambda groups, world_size: dict.fromkeys((group.name for group in groups), 0)
    rank = TrainingRank(communicator, method="rs-kfac", adoption=FixedLag(0))
    rank.run(12)
    rank.close()
    return rank.digest(), rank.pre.counters()["inversions"]["completed"]


def test_synchronous_ranks_equal_one_owner_bit_for_bit(faults: Faults) -> None:
    late_results(faults, polls=3)
    divided, single = run_ranks(3, synchronous, False), run_ranks(3, synchronous, True)
    assert len({digest for digest, _ in [*divided, *single]}) == 1
    assert min(completed for _, completed in divided) > 0
    assert [completed for _, completed in single[1:]] == [0, 0]


# Results of all kinds -------------------------------------------------------------------------------------------------

# With a fixed lag `test_fixed_lag_is_bitwise_whatever_the_delays` has shapes that change and inversions that fail, too.
asap_and_fixed_lag = pytest.mark.parametrize(
    "adoption", ["asap", pytest.param(FixedLag(2), marks=pytest.mark.slow)], ids=["asap", "fixed-lag"]
)


def changing_shapes(communicator: Communicator, adoption: str | FixedLag) -> tuple[list[Record], list[tuple[int, ...]]]:
    """Also returns the shapes of the first block's snapshots, one per step."""
    inverter.install()
    rank = TrainingRank(communicator, method=Moody(), adoption=adoption)
    records, shapes = [], []
    for _ in range(30):
        records.append(rank.step())
        applied = rank.pre.inverses()["0"]
        shapes.append(tuple(applied.U_A.shape))  # pyright: ignore[reportAttributeAccessIssue]
    rank.close()
    return records, shapes


@asap_and_fixed_lag
def test_snapshots_of_changing_shape_arrive_whole(faults: Faults, adoption: str | FixedLag) -> None:
    late_results(faults, polls=2)
    results = run_ranks(2, changing_shapes, adoption)
    check_invariants([records for records, _ in results])
    assert results[0][1] == results[1][1]
    assert {shape[-1] for shape in results[0][1]} == {1, 2, 3}


def failing(communicator: Communicator, adoption: str | FixedLag) -> tuple[list[Record], dict[str, Any]]:
    inverter.install()
    rank = TrainingRank(communicator, method=Moody(), adoption=adoption)
    records, counters = rank.run(30), rank.pre.counters()
    rank.close()
    return records, counters


@asap_and_fixed_lag
def test_a_failed_inversion_is_adopted_and_keeps_the_last_good_snapshot(
    faults: Faults, adoption: str | FixedLag
) -> None:
    late_results(faults, polls=2)
    faults.at(seed=EVERY_OTHER).fail("out of mood")
    results = run_ranks(2, failing, adoption)
    ranks = [records for records, _ in results]
    check_invariants(ranks)
    good = failed = 0
    for record in ranks[0]:
        for group, version in record.adopted:
            good += record.versions[group] == version
            failed += record.versions[group] < version
    assert good > 5
    assert failed > 5
    for _, counters in results:
        assert sum(counters["failures"].values()) == counters["inversions"]["failed"] == failed
        assert all("out of mood" in reason for reason in counters["failures"])


def poisoned(communicator: Communicator, adoption: str | FixedLag) -> tuple[list[Record], dict[str, Any]]:
    """Nobody has finite statistics in the first three steps, which alone are due in the first twenty."""
    rank = TrainingRank(communicator, adoption=adoption, factor_period=20, inverse_period=40)
    records = []
    for step in range(24):
        rank.backward(poisoned=step < 3)
        records.append(rank.second_half())
    counters = rank.pre.counters()
    rank.close()
    return records, counters


@pytest.mark.parametrize("adoption", ["asap", FixedLag(5), FixedLag(0)], ids=["asap", "fixed-lag", "synchronous"])
def test_groups_without_statistics_are_due_again_until_they_have_some(faults: Faults, adoption: str | FixedLag) -> None:
    late_results(faults, polls=2)
    results = run_ranks(2, poisoned, adoption)
    ranks = [records for records, _ in results]
    check_invariants(ranks)
    assert set(ranks[0][0].versions.values()) == {-1}
    assert ranks[0][0].policy["no_snapshot"] == 4
    assert all(version > 2 for version in ranks[0][-1].versions.values())
    assert all("no_snapshot" not in record.policy for record in ranks[0][14:])
    assert all(NO_STATISTICS in counters["failures"] for _, counters in results)
    # Four blocks each; nothing is measured in step 2 while the version of step 1 is under way.
    steps_measured = 3 if adoption == FixedLag(0) else 2
    assert [counters["nonfinite_drops"] for _, counters in results] == [4 * steps_measured] * 2


# Damage ---------------------------------------------------------------------------------------------------------------


def damaged(communicator: Communicator, adoption: str | FixedLag) -> tuple[list[Record], int, str]:
    """Also returns how many payloads were sent again, and the fault that ended it."""
    broadcasts.install()
    rank = TrainingRank(communicator, adoption=adoption)
    records, fault = [], ""
    try:
        records = rank.run(20)
        rank.close()
    except EnvironmentFault as error:
        fault = f"step {rank.pre.next_step}: {error}"
        rank.pre.abandon()
    return records, rank.pre.counters()["resent_broadcasts"], fault


@pytest.mark.parametrize(
    "adoption", [pytest.param("asap", marks=pytest.mark.slow), FixedLag(2)], ids=["asap", "fixed-lag"]
)
def test_a_payload_damaged_on_one_rank_is_used_by_none_and_sent_again(faults: Faults, adoption: str | FixedLag) -> None:
    damage = faults.at(rank=1, payload=6).corrupt()
    results = run_ranks(2, damaged, adoption)
    damage.lift()
    check_invariants([records for records, _, _ in results])
    assert [(resent, fault) for _, resent, fault in results] == [(1, "")] * 2
    assert min(results[0][0][-1].versions.values()) > 8
    if isinstance(adoption, FixedLag):
        whole = run_ranks(2, damaged, adoption)
        assert [record.parameters for record in whole[0][0]] == [record.parameters for record in results[0][0]]


@pytest.mark.parametrize("adoption", ["asap", FixedLag(2)], ids=["asap", "fixed-lag"])
def test_payloads_that_stay_damaged_stop_all_ranks_at_the_same_step(faults: Faults, adoption: str | FixedLag) -> None:
    faults.at(rank=1, payload=range(6, sys.maxsize)).corrupt()
    said = [fault for _, _, fault in run_ranks(2, damaged, adoption)]
    assert said[0] == said[1]
    assert "wrong SHA-256 3 times in a row" in said[0]


def diverging(communicator: Communicator) -> tuple[int, str]:
    """A bit of a parameter flips on rank 1 after step 5."""
    rank = TrainingRank(communicator)
    try:
        while True:
            if rank.step().step == 5 and communicator.rank == 1:
                next(rank.model.parameters()).data.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
    except RanksDiverged as error:
        rank.pre.abandon()
        return rank.pre.next_step, str(error)


def test_parameters_that_differ_in_one_bit_stop_all_ranks_at_the_same_step() -> None:
    results = run_ranks(2, diverging)
    assert results[0] == results[1]
    # Digested in step 6, agreed on one step later.
    assert results[0][0] == 7
    assert "the parameters differ between ranks" in results[0][1]


# Many more of the same ------------------------------------------------------------------------------------------------


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_chaos(faults: Faults) -> None:
    for seed in range(10, 22):
        world_size = 2 + 2 * (seed % 2)
        checks = [partial(check_asap, faults, seed, world_size=world_size, steps=150)]
        for mode in get_args(AtHardBound):
            checks.append(partial(check_policy, faults, mode, seed, world_size=world_size, steps=120))
        checks.append(partial(check_fixed_lag, faults, (seed,), steps=100))
        for check in checks:
            check()
            faults.check()
            faults.clear()
