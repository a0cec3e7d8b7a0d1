"""`Preconditioner.state_dict` in fresh processes: bit for bit on as many ranks, to rounding on others, nothing lost."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.errors import CheckpointError, Interrupted, KfdistError, KfdistWarning
from kfdist.policies.staleness import Adoption, FixedLag
from kfdist.runtime.state import merge_states
from kfdist.types import RunSettings
from kfdist.wire.tree import pack, unpack
from tests.support.adoption_runs import Record, TrainingRank, check_invariants
from tests.support.faults import EACH, Faults, written_script
from tests.support.faulty import broadcasts, inverter
from tests.support.faulty.inverter import Moody
from tests.support.ranks import run_ranks

RANKS, LAG, HALF, STEPS = 3, 5, 13, 24


@pytest.fixture(scope="module")
def faults() -> Iterator[Faults]:
    """In all runs here owners have random speed, and every fifth inversion fails."""
    with written_script() as script:
        script.at(result=EACH).late(10)
        script.at(seed=range(0, 2**63, 5)).fail("out of mood")
        yield script


def make(communicator: Communicator, *, adoption: str | Adoption = FixedLag(LAG), **options: Any) -> TrainingRank:
    """An inverter that depends on random numbers and on its last version."""
    broadcasts.install()
    inverter.install()
    return TrainingRank(communicator, adoption=adoption, **{"method": Moody(), "inverse_period": 3, **options})


def save(rank: TrainingRank, path: Path) -> dict[str, Any]:
    state = {"preconditioner": rank.pre.state_dict(), **rank.optimizer_state()}
    path.write_bytes(pack(state))
    return state["preconditioner"]


def load(rank: TrainingRank, path: Path) -> None:
    state = unpack(path.read_bytes())
    rank.pre.load_state_dict(state["preconditioner"])
    rank.load_optimizer_state(state)


def parameters(ranks: list[list[Record]]) -> list[str]:
    check_invariants(ranks)
    return [record.parameters for record in ranks[0]]


def first_part(
    communicator: Communicator,
    directory: Path,
    steps: int,
    adoption: str | Adoption = FixedLag(LAG),
    fold: bool = False,
) -> tuple[list[Record], dict[str, Any]]:
    """Trains, and saves each rank's own state. On the way, people set another damping."""
    rank = make(communicator, adoption=adoption)
    records = rank.run(5)
    rank.link.wanted = RunSettings(revision=1, changes={"damping": 0.3})
    records += rank.run(steps)
    if fold:
        rank.pre.fold()
    state = save(rank, directory / f"{communicator.rank}")
    facts = {
        "in_flight": {key: sorted(entry) for key, entry in state["in_flight"].items()},
        "pending": state["pending"],
        "travelling": [track.group.index for track in rank.pipeline.tracks if track.ledger.in_flight],
    }
    rank.close()
    return records, facts


def second_part(
    communicator: Communicator, directory: Path, steps: int = STEPS, adoption: str | Adoption = FixedLag(LAG)
) -> list[Record]:
    rank = make(communicator, adoption=adoption)
    load(rank, directory / f"{communicator.rank}")
    records = rank.run(steps)
    rank.close()
    return records


@dataclass(frozen=True)
class Stopped:
    """The run up to HALF: where their states are, what they recorded, and facts about the states."""

    directory: Path
    records: list[list[Record]]
    facts: list[dict[str, Any]]


def stop_at_half(directory: Path, *how: Any) -> Stopped:
    results = run_ranks(RANKS, first_part, directory, HALF, *how)
    return Stopped(directory, [records for records, _ in results], [facts for _, facts in results])


@pytest.fixture(scope="module")
def half(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    del faults
    return stop_at_half(tmp_path_factory.mktemp("half"))


@pytest.fixture(scope="module")
def whole(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The parameters after each step of the uninterrupted run."""
    del faults
    results = run_ranks(RANKS, first_part, tmp_path_factory.mktemp("whole"), STEPS)
    return parameters([records for records, _ in results])


def test_fixed_lag_resumed_with_versions_in_flight_is_bitwise_the_uninterrupted_run(
    half: Stopped, whole: list[str]
) -> None:
    in_flight = {key: entry for facts in half.facts for key, entry in facts["in_flight"].items()}
    assert any("job" in entry for entry in in_flight.values()), "no inversion was under way"
    assert any("result" in entry for entry in in_flight.values()), "no result waited for its step"
    rest = run_ranks(RANKS, second_part, half.directory)
    assert parameters(half.records) + parameters(rest) == whole


def until_the_limit(communicator: Communicator, directory: Path) -> tuple[list[Record], int]:
    """What the wait at step 11 leaves behind is saved."""
    rank = make(communicator)
    records = rank.run(5)
    rank.link.wanted = RunSettings(revision=1, changes={"damping": 0.3})
    records += rank.run(6 + LAG)
    rank.limit_waits(0.3)
    try:
        while True:
            records.append(rank.step())
    except Interrupted:
        save(rank, directory / f"{communicator.rank}")
    rank.close()
    return records, rank.pre.next_step


def test_a_run_interrupted_inside_a_wait_resumes_bit_for_bit(faults: Faults, tmp_path: Path, whole: list[str]) -> None:
    with faults.at(version=6).withhold():
        results = run_ranks(RANKS, until_the_limit, tmp_path)
    assert [step for _, step in results] == [6 + LAG] * RANKS
    rest = run_ranks(RANKS, second_part, tmp_path)
    assert parameters([records for records, _ in results]) + parameters(rest) == whole


def test_asap_resumes_in_the_middle_of_broadcasts_and_waiting_jobs(faults: Faults, tmp_path: Path) -> None:
    with faults.at(payload=EACH).late(9):
        stopped = stop_at_half(tmp_path, "asap")
    check_invariants(stopped.records)
    assert stopped.facts[0]["travelling"], "no broadcast was running"
    rest = run_ranks(RANKS, second_part, tmp_path, 50, "asap")
    check_invariants([first + second for first, second in zip(stopped.records, rest, strict=True)])
    for group, versions in stopped.facts[0]["pending"].items():
        newest = max((version for record in rest[0] for name, version in record.adopted if name == group), default=-1)
        assert newest >= max(versions, default=0), f"{group}: a version under way was lost"


def saves_after_each_step(communicator: Communicator, directory: Path, adoption: str | Adoption) -> list[Record]:
    rank = make(communicator, adoption=adoption)
    records = []
    for step in range(STEPS):
        records.append(rank.step())
        (directory / f"{step}").mkdir(exist_ok=True)
        save(rank, directory / f"{step}" / f"{communicator.rank}")
    rank.close()
    return records


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_chaos_every_step_is_a_good_one_to_stop_after(faults: Faults, tmp_path: Path) -> None:
    for name, adoption in (("fixed-lag", FixedLag(LAG)), ("asap", "asap")):
        (tmp_path / name).mkdir()
        with faults.at(payload=EACH).late(9):
            ranks = run_ranks(RANKS, saves_after_each_step, tmp_path / name, adoption)
        for step in range(STEPS - 1):
            rest = run_ranks(RANKS, second_part, tmp_path / name / f"{step}", STEPS, adoption)
            check_invariants([first[: step + 1] + second for first, second in zip(ranks, rest, strict=True)])
            if name == "fixed-lag":
                assert parameters(rest) == parameters(ranks)[step + 1 :]


# Other numbers of ranks -----------------------------------------------------------------------------------------------


def on_fewer_ranks(communicator: Communicator, directory: Path, writers: int) -> tuple[Mapping[str, Any], list[Record]]:
    """Loads the merged states, returns the totals over the ranks that are here, and trains on."""
    rank = make(communicator)
    states = [unpack((directory / f"{number}").read_bytes()) for number in range(writers)]
    rank.pre.load_state_dict(merge_states([state["preconditioner"] for state in states]))
    rank.load_optimizer_state(states[0])
    rank.pre.fold()
    sums = rank.pre.state_dict()["sums"]
    records = rank.run(STEPS)
    rank.close()
    return sums, records


@pytest.mark.parametrize("fold", [False, True], ids=["per-rank", "folded"])
def test_states_of_all_ranks_go_on_at_two_and_one(tmp_path: Path, half: Stopped, fold: bool) -> None:
    stopped = stop_at_half(tmp_path, FixedLag(LAG), True) if fold else half
    states = [unpack((stopped.directory / f"{rank}").read_bytes())["preconditioner"] for rank in range(RANKS)]
    assert {state["statistics"] for state in states} == {"folded" if fold else "per-rank"}
    for world_size in (2, 1):
        fewer = run_ranks(world_size, on_fewer_ranks, stopped.directory, RANKS)
        check_invariants([records for _, records in fewer])
        for sums, _ in fewer:
            for block, total in sums.items():
                for key in ("A", "G", "n_examples", "n_positions"):
                    own = states[0]["sums"][block][key]
                    expected = own if fold else torch.stack([state["sums"][block][key] for state in states]).sum(0)
                    torch.testing.assert_close(total[key], expected)
        adopted = [each for record in fewer[0][1] for each in record.adopted]
        for group, versions in stopped.facts[0]["pending"].items():
            assert all((group, version) in adopted for version in versions), "a version under way was lost"


# What cannot be right -------------------------------------------------------------------------------------------------


def rank_zero_everywhere(communicator: Communicator, directory: Path) -> tuple[list[Record], list[str]]:
    rank = make(communicator)
    load(rank, directory / "0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = rank.run(STEPS)
    rank.close()
    return records, [str(each.message) for each in caught if each.category is KfdistWarning]


def test_the_state_of_rank_0_alone_loads_everywhere_and_says_what_it_lacks(half: Stopped) -> None:
    results = run_ranks(RANKS, rank_zero_everywhere, half.directory)
    check_invariants([records for records, _ in results])
    assert "no rank's state has the inversions under way" in results[0][1][0]
    assert [said for _, said in results[1:]] == [[], []]
    assert min(results[0][0][-1].versions.values()) >= HALF


def only_some_load(communicator: Communicator, directory: Path, other: Path) -> str:
    rank = make(communicator)
    load(rank, (directory if communicator.rank else other) / f"{communicator.rank}")
    try:
        rank.step()
    except CheckpointError as error:
        rank.pre.abandon()
        return str(error)
    return ""


def test_ranks_that_loaded_different_checkpoints_all_refuse_to_begin(faults: Faults, tmp_path: Path) -> None:
    del faults
    (tmp_path / "other").mkdir()
    run_ranks(2, first_part, tmp_path, HALF)
    run_ranks(2, first_part, tmp_path / "other", HALF - 1)
    said = run_ranks(2, only_some_load, tmp_path, tmp_path / "other")
    assert said[0] == said[1]
    assert "the ranks would begin at steps 12 to 13" in said[0]


def loads_too_late(communicator: Communicator, directory: Path) -> list[str]:
    rank, said = make(communicator), []
    load(rank, directory / "0")
    for _ in range(2):
        with pytest.raises(KfdistError) as caught:
            load(rank, directory / "0")
        said.append(str(caught.value))
        rank.step()
    rank.close()
    return said


def test_a_state_loads_once_and_before_the_first_step(faults: Faults, tmp_path: Path) -> None:
    del faults
    run_ranks(1, first_part, tmp_path, 6)
    for said in run_ranks(1, loads_too_late, tmp_path)[0]:
        assert "load_state_dict() was called after a step or another load" in said
