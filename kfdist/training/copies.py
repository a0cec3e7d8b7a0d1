"""Copies of the run directory: one that all ranks see, or one on each node where nodes share no directory.

The first rank of a copy is its leader: it makes, locks and fills the copy for the others. What one copy has and others
lack, such as the files of another node's ranks, goes from leader to leader.
"""

import hashlib
import os
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kfdist.comm.communicator import Communicator
from kfdist.comm.together import on_every_rank, on_ranks
from kfdist.errors import CheckpointError, EnvironmentFault, RankFailed
from kfdist.system.files import make_directory

_CHUNK_BYTES = 16 << 20
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """A file that goes from one copy to others.

    Attributes:
        file: Its path, the same in all copies, relative to the copy or absolute.
        bytes: Its size.
        sha256: What it must hold.
        source: The leader of a copy that has it.
        targets: The leaders of the copies that lack it.
    """

    file: Path
    bytes: int
    sha256: str
    source: int
    targets: Collection[int]


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Which ranks see which copy of the run directory.

    Attributes:
        communicator: All ranks.
        leader_of: By rank, the first rank that sees the same copy.
    """

    communicator: Communicator
    leader_of: Sequence[int]

    @classmethod
    def one(cls, communicator: Communicator) -> "Copies":
        """Returns the one copy that all ranks see."""
        return cls(communicator=communicator, leader_of=(0,) * communicator.world_size)

    @classmethod
    def by_node(cls, communicator: Communicator, directory: Path) -> "Copies":
        """Takes every node's directory, or every container's, for another copy. All ranks must call it.

        Ranks with the same kernel and the same mounts certainly see the same; about others only `probed` knows.
        """
        place = [_BOOT.read_text().strip(), os.readlink("/proc/self/ns/mnt"), os.fsencode(directory.absolute()).hex()]
        places = communicator.all_gather_json(place)
        return cls(communicator=communicator, leader_of=tuple(places.index(each) for each in places))

    def probed(self, directory: Path) -> "Copies":
        """Returns what is found when leaders write into the directory and look for what others wrote. Collective.

        Raises:
            EnvironmentFault: A node can't make the directory, or not write to it.
        """
        if len(self.leaders) == 1:
            return self
        token = self.communicator.broadcast_json(uuid.uuid4().hex)
        made: list[Path] = []

        def mark(leader: int) -> Path:
            # A name that nobody has looked for yet: what isn't there may be remembered by a network file system.
            return directory / f".seen-{token}-{leader}"

        def write() -> None:
            made.extend(make_directory(directory))
            mark(self.communicator.rank).touch()

        try:
            self.on_leaders(write)
            lowest = self.on_leaders(lambda: next(leader for leader in self.leaders if mark(leader).exists()))
        except RankFailed as failure:
            raise EnvironmentFault(f"not all nodes can write to the run directory {directory}: {failure}") from failure
        finally:
            with suppress(OSError):
                mark(self.communicator.rank).unlink(missing_ok=True)
                for each in made:  # a start that fails before it opens the directory leaves nothing
                    each.rmdir()
        return replace(self, leader_of=tuple(lowest[leader] for leader in self.leader_of))

    @property
    def leaders(self) -> list[int]:
        """The leaders of all copies, in order."""
        return sorted(set(self.leader_of))

    @property
    def leader(self) -> int:
        """The leader of this rank's copy."""
        return self.leader_of[self.communicator.rank]

    @property
    def members(self) -> list[int]:
        """The ranks that see this rank's copy, in order."""
        return [rank for rank, leader in enumerate(self.leader_of) if leader == self.leader]

    def on_leaders(self, work: Callable[[], Any]) -> dict[int, Any]:
        """Does `work` on all leaders; as `on_ranks`."""
        return on_ranks(self.communicator, self.leaders, work)

    def deliver(self, parcels: Sequence[Parcel]) -> None:
        """Brings files to the copies that lack them; all ranks must call it, with the same parcels.

        Raises:
            RankFailed: A file can't be read, written, or didn't come as it should; on all ranks.
        """
        faults: list[Exception] = []
        for parcel in parcels:
            try:
                if self.communicator.rank == parcel.source:
                    self._send(parcel)
                elif self.communicator.rank in parcel.targets:
                    self._receive(parcel)
            except (OSError, CheckpointError) as fault:
                faults.append(fault)

        def told() -> None:
            if faults:
                raise faults[0]

        on_every_rank(self.communicator, told)

    def _send(self, parcel: Parcel) -> None:
        """Sends a file to each target; if it can't be read, as many zeros, since they wait for it."""
        fault: OSError | None = None
        file: BinaryIO | None = None
        try:
            file = parcel.file.open("rb")
        except OSError as error:
            fault = error
        for size in _sizes(parcel):
            content = b""
            try:
                content = file.read(size) if file is not None else b""
            except OSError as error:
                fault = error
            chunk = torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)
            for target in parcel.targets:
                self.communicator.send(chunk, target)
        if file is not None:
            file.close()
        if fault is not None:
            raise fault

    def _receive(self, parcel: Parcel) -> None:
        """Receives a file to its end, even if it can't be written."""
        fault: OSError | None = None
        file: BinaryIO | None = None
        digest = hashlib.sha256()
        try:
            file = parcel.file.open("xb")
        except OSError as error:
            fault = error
        for size in _sizes(parcel):
            content = self.communicator.receive(size, parcel.source)
            digest.update(content)
            try:
                if file is not None and fault is None:
                    file.write(content)
            except OSError as error:
                fault = error
        if file is not None:
            with file:
                file.flush()
                os.fsync(file.fileno())
        if fault is not None:
            raise fault
        if digest.hexdigest() != parcel.sha256:
            raise CheckpointError(f"{parcel.file.name} didn't come from rank {parcel.source} as it was written")


def _sizes(parcel: Parcel) -> list[int]:
    """Returns the sizes of the chunks that a file is sent in."""
    return [min(_CHUNK_BYTES, parcel.bytes - start) for start in range(0, parcel.bytes, _CHUNK_BYTES)]
