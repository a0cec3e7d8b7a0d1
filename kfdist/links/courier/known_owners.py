"""What a courier knows of owners: who there is, which group is whose, and whom to leave alone for a while.

Everything here is a cache that the controller, an owner's list of peers, or experience refills; nothing here waits for
the controller.
"""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from kfdist.policies.assignment import rendezvous

_ABSENT_SECONDS = 3.0
"""An owner that is missing from every list for this long is gone. A controller that was just restarted hears of its
owners one by one, so a single list proves nothing."""

_FIRST_SUSPENSION_SECONDS = 0.25
_LONGEST_SUSPENSION_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class KnownOwner:
    """An owner and where to reach it.

    Attributes:
        owner_id: Its name, kept over restarts.
        address: Where it listens, "host:port".
        fingerprint: What its numbers depend on; empty if unknown.
        draining: Whether it is to get no new jobs.
    """

    owner_id: str
    address: str
    fingerprint: str = ""
    draining: bool = False


@dataclass
class _Standing:
    absent_since: float | None = None
    suspended_until: float = 0.0
    suspension: float = 0.0


class OwnerDirectory:
    """The owners a courier knows, in the order in which it would try them.

    Attributes:
        arrivals: How often an owner has come, moved, or come back after a list without it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Begins empty.

        Args:
            clock: Monotonic seconds.
        """
        self._clock = clock
        self._owners: dict[str, KnownOwner] = {}
        self._standing: dict[str, _Standing] = {}
        self._assigned: dict[str, str] = {}
        self._unlisted: set[str] = set()
        self.arrivals = 0

    @property
    def owners(self) -> list[KnownOwner]:
        """All known owners."""
        return list(self._owners.values())

    def update(self, owners: Iterable[KnownOwner]) -> None:
        """Takes in a list of the live owners; an empty one forgets nobody, as it would leave nowhere to go.

        One that comes back was started again, or can be reached again: what it did before counts no more.
        """
        now = self._clock()
        listed = {owner.owner_id: owner for owner in owners}
        for owner_id in [known for known in self._owners if listed and known not in listed]:
            standing = self._standing[owner_id]
            if standing.absent_since is None:
                standing.absent_since = now
            if now - standing.absent_since >= _ABSENT_SECONDS:
                del self._owners[owner_id], self._standing[owner_id]
        unlisted, self._unlisted = self._unlisted, self._owners.keys() - listed.keys()
        for owner_id, owner in listed.items():
            if not self.is_current(owner) or owner_id in unlisted:
                self._standing[owner_id] = _Standing()
                self.arrivals += 1
            self._standing[owner_id].absent_since = None
            self._owners[owner_id] = owner

    def assign(self, owner_by_group: Mapping[str, str]) -> None:
        """Takes in the controller's assignment."""
        self._assigned = dict(owner_by_group)

    def order(self, group: str, fingerprint: str) -> list[KnownOwner]:
        """Returns the owners that may be tried now, the best first: the assigned one, then by rendezvous hashing.

        Args:
            group: The group of the job.
            fingerprint: What an owner's own must equal; empty where any will do.
        """
        now = self._clock()
        usable = [
            owner_id
            for owner_id in self.matching(fingerprint)
            if self._standing[owner_id].suspended_until <= now and not self._owners[owner_id].draining
        ]
        ranked = rendezvous(group, usable)
        assigned = self._assigned.get(group)
        ranked.sort(key=lambda owner_id: owner_id != assigned)
        return [self._owners[owner_id] for owner_id in ranked]

    def matching(self, fingerprint: str) -> Collection[str]:
        """Returns the names of the owners whose fingerprint fits, as far as it is known."""
        return [
            owner.owner_id
            for owner in self._owners.values()
            if not fingerprint or not owner.fingerprint or owner.fingerprint == fingerprint
        ]

    def is_current(self, owner: KnownOwner) -> bool:
        """Tells whether an owner is still where it was."""
        current = self._owners.get(owner.owner_id)
        return current is not None and current.address == owner.address

    def takes_jobs(self, owner: KnownOwner) -> bool:
        """Tells whether an owner that was chosen before is still where it was, is well, and isn't drained."""
        return self.is_current(owner) and not self.is_suspended(owner) and not self._owners[owner.owner_id].draining

    def suspend(self, owner: KnownOwner) -> None:
        """Leaves an owner alone for a while, longer each time in a row."""
        if self.is_current(owner) and not self.is_suspended(owner):  # one fault fails several calls at once
            standing = self._standing[owner.owner_id]
            standing.suspension = min(
                max(2 * standing.suspension, _FIRST_SUSPENSION_SECONDS), _LONGEST_SUSPENSION_SECONDS
            )
            standing.suspended_until = self._clock() + standing.suspension

    def trust(self, owner: KnownOwner) -> None:
        """Forgets an owner's bad days, after it did a job."""
        if self.is_current(owner):
            standing = self._standing[owner.owner_id]
            standing.suspension, standing.suspended_until = 0.0, 0.0

    def is_suspended(self, owner: KnownOwner) -> bool:
        """Tells whether an owner is left alone at present."""
        return self.is_current(owner) and self._standing[owner.owner_id].suspended_until > self._clock()
