"""Methods with state, memory or rows of their own, resumed in fresh processes: bit for bit, also on fewer ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.curvature.inverters import make_inverter
from kfdist.errors import Interrupted
from kfdist.policies.staleness import FixedLag
from kfdist.runtime.state import merge_states
from kfdist.wire.tree import pack, unpack
from tests.support.adoption_runs import TrainingRank
from tests.support.faults import Faults
from tests.support.ranks import run_ranks

RANKS, HALF, STEPS = 3, 6, 12

KINDS: dict[str, Any] = {
    # Brand takes the fourth layer's A, from sketches: three ranks have 24 rows.
    "b-kfac": make_inverter("b-kfac", rank=3, increment_rows=8, oversampling=2),
    "ekfac": "ekfac",
    "ekfac-adam": "ekfac-adam",
    "ekfac-adam, few": make_inverter("ekfac-adam", rank=1),
    "cg-fac": make_inverter("cg-fac", warm_start=True, jacobi=True),
    "cg-fac, exchanged": make_inverter("cg-fac", warm_start=True, operator="block", solve="owner", examples=12),
    "seng": make_inverter("seng", examples=12, column_sample_size=4),
    "eva": "eva",
    "soap": make_inverter("soap", vectors=True, block_size=8),
    "kl-shampoo": make_inverter("kl-shampoo", vectors=True, block_size=8),
    "shampoo": make_inverter("shampoo", vectors=True, block_size=8),
    "two-level": {"0": "kfac", "*": make_inverter("two-level", inner="rs-kfac", inner_settings={"rank": 4})},
    "mixed": {"0": "kfac-eigen", "7": make_inverter("cg-fac", warm_start=True), "*": "eva"},
}
SHIPS_NOTHING = {"cg-fac", "cg-fac, exchanged", "eva"}


def make(communicator: Communicator, kind: str, **options: Any) -> TrainingRank:
    return TrainingRank(communicator, **{"method": KINDS[kind], "adoption": FixedLag(3), **options})


def save(rank: TrainingRank, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pack({"preconditioner": rank.pre.state_dict(), **rank.optimizer_state()}))


def load(rank: TrainingRank, *paths: Path) -> dict[str, Any]:
    """Loads a rank's own state, or several ranks' merged."""
    states = [unpack(path.read_bytes()) for path in paths]
    own = [state["preconditioner"] for state in states]
    merged = own[0] if len(own) == 1 else merge_states(own)
    rank.pre.load_state_dict(merged)
    rank.load_optimizer_state(states[0])
    return merged


def whole_runs(communicator: Communicator, folder: Path) -> dict[str, str]:
    """Trains with every kind of method; states after HALF steps are saved, and folded ones at the end."""
    digests = {}
    for kind in KINDS:
        rank = make(communicator, kind)
        rank.run(HALF)
        save(rank, folder / kind / f"half-{communicator.rank}")
        rank.run(STEPS)
        digests[kind] = rank.digest()
        rank.pre.fold()
        save(rank, folder / kind / f"folded-{communicator.rank}")
        rank.close()
    return digests


def second_halves(communicator: Communicator, folder: Path) -> dict[str, tuple[str, bool]]:
    """Resumes every kind; also says whether this rank's state had versions under way."""
    found = {}
    for kind in KINDS:
        rank = make(communicator, kind)
        state = load(rank, folder / kind / f"half-{communicator.rank}")
        rank.run(STEPS)
        found[kind] = rank.digest(), bool(state["in_flight"])
        rank.close()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, str]]:
    return run_ranks(RANKS, whole_runs, folder)


@pytest.fixture(scope="module")
def resumed(folder: Path, whole: list[dict[str, str]]) -> list[dict[str, tuple[str, bool]]]:
    del whole
    return run_ranks(RANKS, second_halves, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    kind: str, whole: list[dict[str, str]], resumed: list[dict[str, tuple[str, bool]]]
) -> None:
    assert len({of_rank[kind] for of_rank in whole} | {of_rank[kind][0] for of_rank in resumed}) == 1
    assert any(of_rank[kind][1] for of_rank in resumed) == (kind not in SHIPS_NOTHING), "nothing was under way"


def on_one_rank(communicator: Communicator, folder: Path) -> dict[str, dict[str, Any]]:
    """Loads what the ranks folded, compares it, and trains on."""
    found = {}
    for kind in KINDS:
        rank = make(communicator, kind)
        state = load(rank, *[folder / kind / f"folded-{number}" for number in range(RANKS)])
        own = rank.pre.state_dict()
        records = rank.run(STEPS + 6)
        found[kind] = {
            "before": state,
            "after": own,
            "adopted": [each for record in records for each in record.adopted],
            "finite": all(bool(parameter.isfinite().all()) for parameter in rank.model.parameters()),
            "failures": rank.pre.counters()["failures"],
        }
        rank.close()
    return found


@pytest.fixture(scope="module")
def alone(folder: Path, whole: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    del whole
    return run_ranks(1, on_one_rank, folder)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_folded_states_of_all_ranks_go_on_at_one(kind: str, alone: dict[str, dict[str, Any]]) -> None:
    found = alone[kind]
    before, after = found["before"], found["after"]
    assert (found["finite"], found["failures"]) == (True, {})
    for group, versions in before["pending"].items():
        assert all((group, version) in found["adopted"] for version in versions), f"{group} lost a version under way"
    assert before["memories"].keys() == after["memories"].keys()
    for block, memory in before["memories"].items():
        for part in ("kept", "counts"):
            for name, tensor in memory[part].items():
                assert torch.equal(after["memories"][block][part][name], tensor)
        for part in ("measured", "first_use"):
            value = after["memories"][block][part]
            assert value is memory[part] is None or torch.equal(value, memory[part])
    assert {name: head["version"] for name, head in before["online"].items()} == {
        name: head["version"] for name, head in after["online"].items()
    }
    assert bool(before["online"]) == (kind == "b-kfac")
    own = [
        memory["kept"] or memory["counts"] or memory["measured"] is not None for memory in before["memories"].values()
    ]
    assert any(own) == (kind not in ("b-kfac", "two-level", "shampoo"))
    assert {group for group, _ in found["adopted"]} == set(before["adopted"])


def until_the_limit(communicator: Communicator, folder: Path) -> int:
    rank = make(communicator, "mixed")
    rank.run(7)
    rank.limit_waits(0.2)
    try:
        while True:
            rank.step()
    except Interrupted:
        save(rank, folder / "interrupted" / f"half-{communicator.rank}")
    rank.close()
    return rank.pre.next_step


def after_the_limit(communicator: Communicator, folder: Path) -> str:
    rank = make(communicator, "mixed")
    load(rank, folder / "interrupted" / f"half-{communicator.rank}")
    rank.run(STEPS)
    rank.close()
    return rank.digest()


def test_a_step_done_again_inverts_its_own_groups_again(
    faults: Faults, folder: Path, whole: list[dict[str, str]]
) -> None:
    # Version 4 of the first group never comes; the fourth one, inverted by the ranks themselves, is due meanwhile.
    with faults.at(version=4).withhold():
        assert run_ranks(RANKS, until_the_limit, folder) == [7] * RANKS
    assert set(run_ranks(RANKS, after_the_limit, folder)) == {whole[0]["mixed"]}


def test_the_newest_head_of_an_online_group_survives_a_merge() -> None:
    common = {"step": 9, "statistics": "folded", "world_size": 2, "in_flight": {}, "memories": {}, "snapshots": {}}
    newer, older = ({"version": version, "payload": b""} for version in (7, 3))
    for heads in ([newer, older], [older, newer]):
        states = [{**common, "online": {"a": head}} for head in heads]
        assert merge_states(states)["online"]["a"] is newer
