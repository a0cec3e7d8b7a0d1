"""Checkpoints that are whole or not there: written beside, synced, renamed; the newest whole one is found by itself.

    checkpoints/step-00000123/manifest.json            written last
    checkpoints/step-00000123/shared.safetensors       what is the same on all ranks, written by rank 0
    checkpoints/step-00000123/rank-00000.safetensors   what is a rank's own
    checkpoints/step-00000123.incomplete/              one that is being written, or that never was finished

All methods of `CheckpointStore` are collective. A fault on one rank (a full disk, a lost mount) is told to all, so that
none waits for the others: what fails is the checkpoint, on all ranks alike, never the run.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.comm.communicator import Communicator
from kfdist.comm.together import on_every_rank, on_rank_zero
from kfdist.errors import CheckpointError, RankFailed
from kfdist.system.files import sync_directory, write_file
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
    """The checkpoints of a run, in a directory that all its ranks see.

    Attributes:
        skipped: Sentences about damaged checkpoints that `newest` passed over.
    """

    def __init__(self, directory: Path, communicator: Communicator, *, keep: int) -> None:
        self.skipped: list[str] = []
        self._directory = directory
        self._communicator = communicator
        self._keep = keep
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
        """
        started = time.perf_counter()
        if step == self._known_step:
            return Saved(step=step, fault="", bytes=0, seconds=0.0)
        final = self._directory / f"step-{step:08d}"
        partial = final.with_suffix(".incomplete")
        size = 0
        try:
            self._on_first_rank(lambda: self._prepare(partial))
            entries = self._on_every_rank(lambda: self._write_files(partial, shared, own))
            files = {name: FileEntry(**entry) for of_rank in entries for name, entry in of_rank.items()}
            size = sum(entry.bytes for entry in files.values())
            manifest = Manifest(
                step=step,
                world_size=self._communicator.world_size,
                statistics=statistics,
                config_sha256=config_sha256,
                files=files,
                facts=facts,
            )
            self._on_first_rank(lambda: self._commit(partial, final, manifest))
        except RankFailed as failure:
            self._tidy(lambda: shutil.rmtree(partial, ignore_errors=True))
            return Saved(step=step, fault=str(failure), bytes=size, seconds=time.perf_counter() - started)
        self._known_step = step
        self._tidy(self._prune)
        return Saved(step=step, fault="", bytes=size, seconds=time.perf_counter() - started)

    def newest(self) -> Path | None:
        """Finds the newest checkpoint whose every file is whole; `skipped` says why the others are passed over.

        The work of checking is divided among the ranks.

        Raises:
            CheckpointError: The directory can't be read, or another version of kfdist wrote the newest checkpoint:
                going on from an older one, or from none, would throw it away.
        """
        try:
            names = on_rank_zero(self._communicator, self._resumable)
        except RankFailed as failure:
            raise CheckpointError(f"can't resume from the checkpoints in {self._directory}: {failure}") from failure
        for name in names:
            try:
                self._on_every_rank(lambda name=name: self._check_share(self._directory / name))
            except RankFailed as failure:
                self.skipped.append(f"checkpoint {name} is damaged and skipped: {failure}")
            else:
                return self._directory / name
        return None

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

    def _on_first_rank(self, work: Callable[[], object]) -> None:
        """Works on rank 0 alone; the others wait for it, and a fault names it."""

        def alone() -> None:
            if self._communicator.rank == 0:
                work()

        self._on_every_rank(alone)

    def _tidy(self, work: Callable[[], object]) -> None:
        """Removes what is of no more use; what can't be removed stays."""
        with suppress(RankFailed):
            self._on_first_rank(work)

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
        write_file(partial / NAME, manifest.encode())
        sync_directory(partial)
        # A directory of this step that is still there was found damaged, or it would have been resumed from.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_directory(self._directory)

    def _prune(self) -> None:
        for name in self._candidates()[self._keep :]:
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
        return sorted((e.name for e in entries if e.name.removeprefix("step-").isdigit()), reverse=True)

    def _check_share(self, path: Path) -> None:
        manifest = Manifest.read(path)
        expected = {SHARED, *(_rank_file(rank) for rank in range(manifest.world_size))}
        if expected != set(manifest.files):
            raise CheckpointError(f"{NAME} doesn't list the files of {manifest.world_size} ranks")
        for name in sorted(expected)[self._communicator.rank :: self._communicator.world_size]:
            manifest.check_file(path, name)

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


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
