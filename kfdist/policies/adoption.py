"""The adoption protocol as a pure state machine: when a group enters a broadcast, and when it swaps.

Each rank holds one `AdoptionLedger` a group. Once a step the ranks combine their `encode_table` by an elementwise
maximum into one table that is the same everywhere, and every rank asks its ledgers what follows from it. Decisions
depend on agreed tables alone, never on local timing, so all ranks enter the same broadcasts and swap the same versions
at the same step. Nothing here communicates, reads a clock or imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

ABSENT = -(2**63)
"""Identity of the maximum over int64: a column nobody fills."""

NO_VERSION = -1
"""The version before any: training steps count from 0."""

_COMMON_COLUMNS = 4


class AgreedGroup(NamedTuple):
    """What one step's table says of a group, equal on all ranks.

    Attributes:
        announced: The newest version whose result its courier rank holds in a frozen slot.
        received: The newest broadcast that every rank has received and verified, by serial number.
        rejected: The newest broadcast that some rank received with a wrong digest, by serial number.
    """

    announced: int
    received: int
    rejected: int


@dataclass(frozen=True, kw_only=True)
class AgreedTable:
    """One step's table, equal on all ranks.

    Attributes:
        groups: One entry per group.
        revision: The newest settings that rank 0 has heard of.
        stop: Whether some rank was asked to stop.
        digests_differ: Whether the ranks' parameters differ; None on steps that do not check.
    """

    groups: tuple[AgreedGroup, ...]
    revision: int
    stop: bool
    digests_differ: bool | None


@dataclass
class AdoptionLedger:
    """One rank's view of a group's newest versions.

    A broadcast is named by its serial number within its group, counted alike on all ranks, because the same version
    may have to be broadcast again after a rank received it with a wrong digest.

    Attributes:
        announced: Newest version this rank announced; only the courier rank ever announces.
        entered: Version of the newest broadcast that all ranks entered.
        adopted: Version in use.
        serial: Number of the newest broadcast.
        received: Number of the newest broadcast that this rank holds, verified.
        rejected: Number of the newest broadcast that reached this rank with a wrong digest.
        in_flight: Whether a broadcast was entered and neither swapped in nor given up.
    """

    announced: int = NO_VERSION
    entered: int = NO_VERSION
    adopted: int = NO_VERSION
    serial: int = 0
    received: int = 0
    rejected: int = 0
    in_flight: bool = False

    # What happened on this rank ------------------------------------------------------------------------------------

    def announce(self, version: int) -> None:
        """The courier rank holds this version's verified result in a frozen slot."""
        self.announced = max(self.announced, version)

    def receive(self) -> None:
        """This rank holds the running broadcast's payload, verified."""
        self.received = self.serial

    def reject(self) -> None:
        """This rank got the running broadcast's payload with a wrong digest."""
        self.rejected = self.serial

    # What all ranks do, alike ----------------------------------------------------------------------------------------

    def swaps(self, agreed: AgreedGroup) -> bool:
        """Says whether all ranks have received the running broadcast: the group swaps now."""
        return self.in_flight and agreed.received >= self.serial

    def gives_up(self, agreed: AgreedGroup) -> bool:
        """Says whether some rank received the running broadcast wrongly: nobody swaps, it is sent again."""
        return self.in_flight and agreed.rejected >= self.serial

    def enters(self, agreed: AgreedGroup) -> bool:
        """Says whether a newer version is announced and no broadcast runs: the group enters one."""
        return not self.in_flight and agreed.announced > self.adopted

    def enter(self, version: int) -> None:
        """All ranks enter a broadcast of this version, which the agreed header named."""
        if self.in_flight:
            raise AssertionError(f"a broadcast of version {version} was entered while one of {self.entered} runs")
        self._check_forward(version)
        self.entered = version
        self.serial += 1
        self.in_flight = True

    def adopt(self, version: int) -> None:
        """All ranks hold this version and take it into use, from the running broadcast or from an agreed wait."""
        self._check_forward(version)
        if self.in_flight and version != self.entered:
            raise AssertionError(f"version {version} is adopted while version {self.entered} travels")
        self.in_flight = False
        self.adopted = self.entered = version

    def give_up(self) -> None:
        """All ranks forget the running broadcast."""
        self.in_flight = False
        self.entered = self.adopted

    def restore(self, version: int) -> None:
        """A checkpoint says that this version is in use, on all ranks."""
        self.adopted = self.entered = version

    def _check_forward(self, version: int) -> None:
        if version <= self.adopted:
            raise AssertionError(f"a group would go back from version {self.adopted} to {version}")


def encode_table(ledgers: Sequence[AdoptionLedger], *, revision: int | None, stop: bool) -> list[int]:
    """Lays one rank's contribution out as int64 columns for a MAX reduction.

    The last two columns are for a digest h of the rank's parameters, as (h, not h): the maximum of ~h is the
    complement of the minimum of h. They are absent here; whoever sends the table fills them in on the device, on all
    ranks or none.

    Args:
        ledgers: The rank's, one per group.
        revision: Newest settings heard of; None on every rank but 0.
        stop: Whether this rank was asked to stop.
    """
    announced = [ledger.announced for ledger in ledgers]
    not_received = [-ledger.received for ledger in ledgers]  # the maximum of -serial is minus the minimum
    rejected = [ledger.rejected for ledger in ledgers]
    return [*announced, *not_received, *rejected, ABSENT if revision is None else revision, int(stop), ABSENT, ABSENT]


def decode_table(columns: Sequence[int]) -> AgreedTable:
    """Reads a reduced table back."""
    groups = (len(columns) - _COMMON_COLUMNS) // 3
    announced, not_received, rejected = (columns[i * groups : (i + 1) * groups] for i in range(3))
    revision, stop, highest, not_lowest = columns[3 * groups :]
    return AgreedTable(
        groups=tuple(
            AgreedGroup(newest, -least, wrong)
            for newest, least, wrong in zip(announced, not_received, rejected, strict=True)
        ),
        revision=revision,
        stop=bool(stop),
        digests_differ=None if highest == ABSENT and not_lowest == ABSENT else highest != ~not_lowest,
    )
