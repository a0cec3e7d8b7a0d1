"""Checkpoints that are whole or not there: written beside, synced, renamed; the newest whole one is found by itself.

    checkpoints/step-00000123/manifest.json            written last
    checkpoints/step-00000123/shared.safetensors       what is the same on all ranks, written by rank 0
    checkpoints/step-00000123/rank-00000.safetensors   what is a rank's own
    checkpoints/step-00000123.incomplete/              one that is being written, or that never was finished

Where nodes share no directory, each of them holds a complete copy; a run goes on from the newest that any of them has.

All methods of `CheckpointStore` are collective. A fault on one rank (a full disk, a lost mount) is told to all, so that
none waits for the others: what fails is the checkpoint, on all ranks alike, never the run.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.comm.together import attempts_of_every_rank, on_every_rank, on_ranks
from kfdist.errors import CheckpointError, RankFailed
from kfdist.system.files import sync_directory, write_file
from kfdist.training.copies import Copies, Parcel
from kfdist.training.manifest import NAME, FileEntry, Manifest, OtherFormat
from kfdist.wire.tree import pack, unpack

SHARED = "shared.safetensors"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """How saving a checkpoint ended.

    Attributes:
        step: Its step.
        fault: Why there is no checkpoint, naming the ranks; empty if there is one.
        bytes: Its size.
        seconds: How long it took.
    """

    step: int
    fault: str
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint's content, tensors on the CPU.

    Attributes:
        manifest: What it says about itself.
        shared: The state that was the same on all ranks.
        ranks: The own states of the ranks that wrote it, in order. At the same world size only this rank's is read;
            the others are None.
    """

    manifest: Manifest
    shared: dict[str, Any]
    ranks: list[dict[str, Any] | None]


class CheckpointStore:
    """The checkpoints of a run, in a directory that all its ranks see, or in one on each node.

    Args:
        directory: Where this rank sees it.
        copies: Which ranks see the same.
        keep: How many checkpoints are kept.
        check_start: Raises where another start has taken the run over; called by the leader of each copy.

    Attributes:
        remarks: Sentences about damaged checkpoints that `newest` passed over, and about one that nodes lacked.
    """

    def __init__(
        self, directory: Path, copies: Copies, *, keep: int, check_start: Callable[[], object] = lambda: None
    ) -> None:
        self.remarks: list[str] = []
        self._directory = directory
        self._copies = copies
        self._communicator = copies.communicator
        self._keep = keep
        self._check_start = check_start
        self._known_step: int | None = None

    def save(
        self,
        shared: Mapping[str, Any],
        own: Mapping[str, Any],
        *,
        step: int,
        statistics: str,
        config_sha256: str,
        facts: Mapping[str, Any],
    ) -> Saved:
        """Writes a checkpoint; nothing happens if this store has saved or loaded this very step.

        Args:
            shared: State that is the same on all ranks; rank 0's is written.
            own: This rank's own state.
            step: Steps that are done.
            statistics: "per-rank" or "folded".
            config_sha256: Digest of the resolved configuration.
            facts: For the manifest.

        Raises:
            RankFailed: Another start has taken the run over; nothing was written.
        """
        started = time.perf_counter()
        if step == self._known_step:
            return Saved(step=step, fault="", bytes=0, seconds=0.0)
        final = self._directory / f"step-{step:08d}"
        partial = final.with_suffix(".incomplete")
        size = 0
        self._on_leaders(self._check_start)
        try:
            self._on_leaders(lambda: self._prepare(partial))
            entries = self._on_every_rank(lambda: self._write_files(partial, shared, own))
            files = {name: FileEntry(**entry) for of_rank in entries for name, entry in of_rank.items()}
            size = sum(entry.bytes for entry in files.values())
            self._copies.deliver(self._parcels(partial, files))
            manifest = Manifest(
                step=step,
                world_size=self._communicator.world_size,
                statistics=statistics,
                config_sha256=config_sha256,
                files=files,
                facts=facts,
            )
            # Rank 0's in all copies: the clocks differ.
            manifest = Manifest.from_json(self._communicator.broadcast_json(manifest.as_json()))
            self._on_leaders(lambda: self._commit(partial, final, manifest))
        except RankFailed as failure:
            self._tidy(lambda: shutil.rmtree(partial, ignore_errors=True))
            return Saved(step=step, fault=str(failure), bytes=size, seconds=time.perf_counter() - started)
        self._known_step = step
        self._tidy(self._prune)
        return Saved(step=step, fault="", bytes=size, seconds=time.perf_counter() - started)

    def newest(self) -> Path | None:
        """Finds the newest checkpoint whose every file is whole; `remarks` says why the others are passed over.

        The work of checking is divided among the ranks.

        Raises:
            CheckpointError: The directory can't be read, or another version of kfdist wrote the newest checkpoint:
                going on from an older one, or from none, would throw it away.
        """
        try:
            listed = self._copies.on_leaders(self._resumable)
        except RankFailed as failure:
            raise CheckpointError(f"can't resume from the checkpoints in {self._directory}: {failure}") from failure
        for name in sorted({name for names in listed.values() for name in names}, key=_step_of, reverse=True):
            whole, damage = self._whole_copies(name)
            if whole:
                self._complete(name, whole)
                return self._directory / name
            self.remarks.append(f"checkpoint {name} is damaged and skipped: {damage}")
        return None

    def _whole_copies(self, name: str) -> tuple[list[int], str]:
        """Returns the leaders of the copies that have a checkpoint whole and alike; else none, and what is wrong."""
        found, _ = attempts_of_every_rank(self._communicator, lambda: self._check_share(self._directory / name))
        damage = {rank: reason for rank, (_, reason) in enumerate(found) if reason is not None}
        damaged = {self._copies.leader_of[rank] for rank in damage}
        whole = [leader for leader in self._copies.leaders if leader not in damaged]
        if not whole:
            return [], "; ".join(f"rank {rank}: {reason}" for rank, reason in damage.items())
        # Nodes that trained without each other may both have this step; the one that was written last is the run's.
        newest = max(found[leader][0] for leader in whole)
        return [leader for leader in whole if found[leader][0] == newest], ""

    def _complete(self, name: str, whole: Sequence[int]) -> None:
        """Gives a checkpoint to the copies that lack it."""
        lacking = [leader for leader in self._copies.leaders if leader not in whole]
        if not lacking:
            return
        source = whole[0]
        final = self._directory / name
        partial = final.with_suffix(".incomplete")
        place = partial if self._communicator.rank in lacking else final
        try:
            read = on_ranks(self._communicator, [source], lambda: Manifest.read(final).as_json())
            manifest = Manifest.from_json(read[source])
            on_ranks(self._communicator, lacking, lambda: self._prepare(partial))
            self._copies.deliver(
                [
                    Parcel(file=place / file, source=source, targets=lacking, **vars(entry))
                    for file, entry in manifest.files.items()
                ]
            )
            on_ranks(self._communicator, lacking, lambda: self._commit(partial, final, manifest))
        except RankFailed as failure:
            raise CheckpointError(f"{name} can't be copied to the nodes that lack it: {failure}") from failure
        ranks = ", ".join(map(str, lacking))
        self.remarks.append(f"checkpoint {name} was copied from the node of rank {source} to that of rank {ranks}")

    def load(self, path: Path) -> Loaded:
        """Reads a checkpoint that `newest` found.

        Raises:
            CheckpointError: It is damaged after all, on any rank.
        """
        result: list[Loaded] = []
        try:
            self._on_every_rank(lambda: result.append(self._read(path)))
        except RankFailed as failure:
            raise CheckpointError(f"checkpoint {path.name} can't be read: {failure}") from failure
        self._known_step = result[0].manifest.step
        return result[0]

    def _on_every_rank(self, work: Callable[[], Any]) -> list[Any]:
        return on_every_rank(self._communicator, work)

    def _on_leaders(self, work: Callable[[], object]) -> None:
        """Works on the leader of each copy alone; the others wait for it, and a fault names it."""

        def alone() -> None:
            if self._copies.leader == self._communicator.rank:
                work()

        self._on_every_rank(alone)

    def _parcels(self, directory: Path, files: Mapping[str, FileEntry]) -> list[Parcel]:
        """Returns what copies lack of a checkpoint of which each rank has written its own files to its own copy."""
        origin = {SHARED: 0} | {_rank_file(rank): leader for rank, leader in enumerate(self._copies.leader_of)}
        leaders = self._copies.leaders
        return [
            Parcel(
                file=directory / name,
                source=origin[name],
                targets=[leader for leader in leaders if leader != origin[name]],
                **vars(entry),
            )
            for name, entry in sorted(files.items())
            if len(leaders) > 1
        ]

    def _tidy(self, work: Callable[[], object]) -> None:
        """Removes what is of no more use; what can't be removed stays."""
        with suppress(RankFailed):
            self._on_leaders(work)

    def _prepare(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def _write_files(self, partial: Path, shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        files = {_rank_file(self._communicator.rank): own}
        if self._communicator.rank == 0:
            files[SHARED] = shared
        entries = {}
        for name, state in files.items():
            content = pack(state)
            write_file(partial / name, content)
            entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return entries

    def _commit(self, partial: Path, final: Path, manifest: Manifest) -> None:
        self._check_start()
        write_file(partial / NAME, manifest.encode())
        sync_directory(partial)
        # A directory of this step that is still there was found damaged, or it would have been resumed from.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_directory(self._directory)

    def _prune(self) -> None:
        # One of a later step was found damaged, or it would have been resumed from, and must not cost a whole one its
        # place; it stays until the run comes to its step again.
        done = [name for name in self._candidates() if _step_of(name) <= (self._known_step or 0)]
        for name in done[self._keep :]:
            # Without its manifest a checkpoint counts as damaged, so one that is half removed is never taken for whole.
            (self._directory / name / NAME).unlink(missing_ok=True)
            shutil.rmtree(self._directory / name, ignore_errors=True)
        for leftover in self._directory.glob("step-*.incomplete"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _resumable(self) -> list[str]:
        """Returns the candidates, if the newest with a manifest that can be read is of this version's format."""
        names = self._candidates()
        for name in names:
            try:
                Manifest.read(self._directory / name)
            except OtherFormat as error:
                raise CheckpointError(f"{name}: {error}") from error
            except CheckpointError:
                continue
            break
        return names

    def _candidates(self) -> list[str]:
        """Returns the names of what looks like checkpoints, newest first."""
        entries = self._directory.glob("step-*") if self._directory.exists() else ()
        names = (each.name for each in entries)
        return sorted((name for name in names if name.removeprefix("step-").isdigit()), key=_step_of, reverse=True)

    def _check_share(self, path: Path) -> tuple[float, str]:
        """Checks this rank's share of a checkpoint in its copy; returns when it was written, and its digest."""
        manifest = Manifest.read(path)
        expected = {SHARED, *(_rank_file(rank) for rank in range(manifest.world_size))}
        if expected != set(manifest.files):
            raise CheckpointError(f"{NAME} doesn't list the files of {manifest.world_size} ranks")
        members = self._copies.members
        for name in sorted(expected)[members.index(self._communicator.rank) :: len(members)]:
            manifest.check_file(path, name)
        return float(manifest.facts.get("unix_time", 0.0)), manifest.as_json()["sha256"]

    def _read(self, path: Path) -> Loaded:
        manifest = Manifest.read(path)
        same_world = manifest.world_size == self._communicator.world_size
        ranks = [
            _unpack(manifest, path, _rank_file(rank)) if not same_world or rank == self._communicator.rank else None
            for rank in range(manifest.world_size)
        ]
        return Loaded(manifest=manifest, shared=_unpack(manifest, path, SHARED), ranks=ranks)


def _unpack(manifest: Manifest, path: Path, name: str) -> Any:
    try:
        return unpack(manifest.check_file(path, name))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _step_of(name: str) -> int:
    # By number: of names of more than eight digits the order is another.
    return int(name.removeprefix("step-"))


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
