"""The adoption protocol as a pure state machine: which group enters a broadcast, which one swaps, and when.

Each rank holds one `AdoptionLedger`. Once a step the ranks combine their `columns` by an elementwise maximum into one
table that is the same everywhere, and every rank asks its ledger what follows from it. Decisions depend on agreed
tables alone, never on local timing, so all ranks enter the same broadcasts and swap the same versions at the same step.
Nothing here communicates, reads a clock or imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

ABSENT = -(2**63)
"""Identity of the maximum over int64: a column nobody fills."""

NO_VERSION = -1
"""The version before any: training steps count from 0."""


@dataclass(frozen=True, kw_only=True)
class AgreedTable:
    """One step's table, equal on all ranks.

    Attributes:
        announced: Per group, the newest version whose result its courier rank holds in a frozen slot.
        received: Per group, the newest broadcast that every rank has received and verified, by serial number.
        rejected: Per group, the newest broadcast that some rank received with a wrong digest, by serial number.
        revision: The newest settings that rank 0 has heard of.
        stop: Whether some rank was asked to stop.
        digests_differ: Whether the ranks' parameters differ; None on steps that do not check.
    """

    announced: tuple[int, ...]
    received: tuple[int, ...]
    rejected: tuple[int, ...]
    revision: int
    stop: bool
    digests_differ: bool | None


def encode_table(ledger: "AdoptionLedger", *, revision: int | None, stop: bool) -> list[int]:
    """Lays one rank's contribution out as int64 columns for a MAX reduction.

    The last two columns are for a digest h of the rank's parameters, as (h, not h): the maximum of ~h is the
    complement of the minimum of h. They are absent here; whoever sends the table fills them in on the device, on all
    ranks or none.

    Args:
        ledger: The rank's ledger.
        revision: Newest settings heard of; None on every rank but 0.
        stop: Whether this rank was asked to stop.
    """
    tail = [ABSENT if revision is None else revision, int(stop), ABSENT, ABSENT]
    return [*ledger.announced, *(-serial for serial in ledger.received), *ledger.rejected, *tail]


def decode_table(columns: Sequence[int], groups: int) -> AgreedTable:
    """Reads a reduced table back."""
    revision, stop, highest, not_lowest = columns[3 * groups :]
    return AgreedTable(
        announced=tuple(columns[:groups]),
        received=tuple(-value for value in columns[groups : 2 * groups]),
        rejected=tuple(columns[2 * groups : 3 * groups]),
        revision=revision,
        stop=bool(stop),
        digests_differ=None if highest == ABSENT and not_lowest == ABSENT else highest != ~not_lowest,
    )


class AdoptionLedger:
    """One rank's view of every group's newest versions.

    A broadcast is named by its serial number within its group, counted alike on all ranks, because the same version
    may have to be broadcast again after a rank received it with a wrong digest.

    Attributes:
        announced: Newest version this rank announced, per group; only courier ranks ever announce.
        entered: Version of the newest broadcast that all ranks entered.
        adopted: Version in use.
        serial: Number of the newest broadcast.
        received: Number of the newest broadcast that this rank holds, verified.
        rejected: Number of the newest broadcast that reached this rank with a wrong digest.
    """

    def __init__(self, groups: int) -> None:
        self.announced = [NO_VERSION] * groups
        self.entered = [NO_VERSION] * groups
        self.adopted = [NO_VERSION] * groups
        self.serial = [0] * groups
        self.received = [0] * groups
        self.rejected = [0] * groups
        self._in_flight = [False] * groups

    # What happened on this rank ------------------------------------------------------------------------------------

    def announce(self, group: int, version: int) -> None:
        """The courier rank holds this version's verified result in a frozen slot."""
        if version > self.announced[group]:
            self.announced[group] = version

    def receive(self, group: int) -> None:
        """This rank holds the running broadcast's payload, verified."""
        self.received[group] = self.serial[group]

    def reject(self, group: int) -> None:
        """This rank got the running broadcast's payload with a wrong digest."""
        self.rejected[group] = self.serial[group]

    # What all ranks do, alike ----------------------------------------------------------------------------------------

    def in_flight(self, group: int) -> bool:
        """Says whether a broadcast of the group was entered and neither swapped in nor given up."""
        return self._in_flight[group]

    def swaps(self, table: AgreedTable) -> list[int]:
        """Returns the groups whose running broadcast all ranks have received: they swap now."""
        return [
            group
            for group in range(len(self.serial))
            if self._in_flight[group] and table.received[group] >= self.serial[group]
        ]

    def give_ups(self, table: AgreedTable) -> list[int]:
        """Returns the groups whose running broadcast some rank received wrongly: nobody swaps, it is sent again."""
        return [
            group
            for group in range(len(self.serial))
            if self._in_flight[group] and table.rejected[group] >= self.serial[group]
        ]

    def entries(self, table: AgreedTable) -> list[int]:
        """Returns, in group order, the groups of which a newer version is announced and no broadcast runs."""
        return [
            group
            for group in range(len(self.serial))
            if not self._in_flight[group] and table.announced[group] > self.adopted[group]
        ]

    def enter(self, group: int, version: int) -> None:
        """All ranks enter a broadcast of this version, which the agreed header named."""
        if self._in_flight[group]:
            raise AssertionError(f"group {group} entered a broadcast while one runs")
        if version <= self.adopted[group]:
            raise AssertionError(f"group {group} would go back from version {self.adopted[group]} to {version}")
        self.entered[group] = version
        self.serial[group] += 1
        self._in_flight[group] = True

    def adopt(self, group: int, version: int) -> None:
        """All ranks hold this version and take it into use, from the running broadcast or from an agreed wait."""
        if version <= self.adopted[group]:
            raise AssertionError(f"group {group} would go back from version {self.adopted[group]} to {version}")
        if self._in_flight[group] and version != self.entered[group]:
            raise AssertionError(f"group {group} adopts {version} while version {self.entered[group]} travels")
        self._in_flight[group] = False
        self.adopted[group] = self.entered[group] = version

    def give_up(self, group: int) -> None:
        """All ranks forget the running broadcast."""
        self._in_flight[group] = False
        self.entered[group] = self.adopted[group]

    def restore(self, group: int, version: int) -> None:
        """A checkpoint says that this version is in use, on all ranks."""
        self.adopted[group] = self.entered[group] = version
