"""Runs on nodes that share no directory: each holds all of the run, and a restart goes on from the newest of them."""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kfdist.comm.communicator import Communicator
from kfdist.errors import RankFailed
from kfdist.training.copies import Copies, Parcel
from tests.support.ranks import run_ranks
from tests.support.training import FIXED_LAG, events, train

RUN = Path("run")
"""The run directory, relative to each rank's own working directory, which stands for its node's disk."""


def enter(nodes: Sequence[str], rank: int) -> None:
    Path(nodes[rank]).mkdir(exist_ok=True)
    os.chdir(nodes[rank])


@dataclass
class Nodes:
    """A folder of nodes' disks."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def __getitem__(self, node: str) -> Path:
        return self.folder / node

    def train(self, nodes: str, *overrides: str) -> dict[str, Any]:
        """Trains with one rank for each letter, on the node of that name; returns the summary on rank 0's node."""
        places = [str(self[node]) for node in nodes]
        self[nodes[0]].mkdir(exist_ok=True)
        self.monkeypatch.chdir(self[nodes[0]])
        return train(RUN, *FIXED_LAG, *overrides, ranks=len(nodes), prepare=partial(enter, places))

    def files(self, node: str) -> dict[str, str]:
        """Returns the digests of the files of a node's checkpoints."""
        checkpoints = self[node] / RUN / "checkpoints"
        found = [path for path in checkpoints.rglob("*") if path.is_file()]
        return {str(path.relative_to(checkpoints)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(tmp_path, monkeypatch)


def test_each_node_holds_the_whole_run_and_rank_0_on_an_empty_one_goes_on(nodes: Nodes):
    whole = nodes.train("www")
    nodes.train("abb", "run.steps=12")
    half = nodes.train("abb", "run.steps=19")
    assert (half["start"], half["checkpoint_faults"]) == (2, 0)
    names = {"manifest.json", "shared.safetensors", *(f"rank-{rank:05d}.safetensors" for rank in range(3))}
    assert {path for path in nodes.files("a")} == {f"step-{step:08d}/{name}" for step in (12, 19) for name in names}
    assert nodes.files("b") == nodes.files("a")
    for file in ("config.toml", "epochs/00002.toml"):
        assert (nodes["a"] / RUN / file).read_bytes() == (nodes["b"] / RUN / file).read_bytes()
    # The newest copy on `b` is damaged, rank 0 comes to a node that was never there, and one that was there is gone.
    manifest = nodes["b"] / RUN / "checkpoints" / "step-00000019" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("19", "18"))
    shutil.rmtree(nodes["a"] / RUN / "epochs")
    rest = nodes.train("cba")
    assert rest["start"] == 3, "higher than on any node"
    assert [line["step"] for line in events(nodes["c"] / RUN, "start")] == [19]
    assert rest["parameter_sha256"] == whole["parameter_sha256"]
    assert nodes.files("a") == nodes.files("b")
    assert nodes.files("c").items() <= nodes.files("a").items()
    assert {path.split("/")[0] for path in nodes.files("c")} == {"step-00000019", "step-00000040"}
    # Finished, as the other node knows.
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        nodes.train("da")
    assert not (nodes["d"] / RUN).exists()


def leaders_seen(communicator: Communicator, places: Sequence[str]) -> tuple[list[int], list[int]]:
    enter(places, communicator.rank)
    copies = Copies.by_node(communicator, RUN)
    return list(copies.leader_of), list(copies.probed(RUN).leader_of)


def test_who_shares_a_directory_is_found_by_what_is_seen_there(tmp_path: Path):
    for node in "ab":
        (tmp_path / node / RUN).mkdir(parents=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / RUN).symlink_to(tmp_path / "b" / RUN)  # another path to what `b` has
    places = [str(tmp_path / node) for node in "abcd"]
    assert run_ranks(4, leaders_seen, places) == [([0, 1, 2, 3], [0, 1, 1, 3])] * 4
    assert not (tmp_path / "d" / RUN).exists() and not list((tmp_path / "b" / RUN).iterdir())


def deliver(communicator: Communicator, folder: str, source: str, target: str) -> str:
    content = bytes(range(256)) * 1000
    copies = Copies(communicator=communicator, leader_of=(0, 1))
    name = source if communicator.rank == 0 else target
    digest = hashlib.sha256(content).hexdigest()
    good, bad = (
        Parcel(file=Path(folder) / file, bytes=len(content), sha256=digest, source=0, targets=[1])
        for file in (f"good-{communicator.rank}", name)
    )
    if communicator.rank == 0:
        good.file.write_bytes(content)
        (Path(folder) / "short").write_bytes(content[:-1])
        (Path(folder) / "whole").write_bytes(content)
    communicator.all_gather_json(None)
    try:
        copies.deliver([bad, good])
    except RankFailed as failure:
        return str(failure)
    finally:
        assert communicator.rank == 0 or good.file.read_bytes() == content
    return ""


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("whole", "copy", ""),
        ("missing", "copy", "rank 0: .*No such file.*missing"),
        ("short", "copy", "rank 1: copy didn't come from rank 0 as it was written"),
        ("whole", "none/copy", "rank 1: .*No such file.*none/copy"),
    ],
)
def test_a_file_that_cannot_be_read_or_written_keeps_nobody_waiting(
    tmp_path: Path, source: str, target: str, reason: str
):
    first, second = run_ranks(2, deliver, str(tmp_path), source, target)
    assert first == second
    assert (re.search(reason, first) is not None) if reason else first == ""
