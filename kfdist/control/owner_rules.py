"""The rules of owners: who is remembered, who may be drained, and what logs are told of them. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import grpc

from kfdist.control.control_records import Event, OwnerRecord
from kfdist.rpc.status import Refusal

DEAD_OWNERS_KEPT = 256
"""Owners remembered beside the live ones, with how often they were started."""


def changed(owners: Mapping[str, OwnerRecord], new: Sequence[OwnerRecord]) -> dict[str, OwnerRecord]:
    """Returns owners in the order of their last change."""
    named = {owner.owner_id: owner for owner in new}
    return {name: owner for name, owner in owners.items() if name not in named} | named


def forgettable(owners: Mapping[str, OwnerRecord]) -> frozenset[str]:
    """Returns the longest dead owners beyond those that are kept; every new pool has new names."""
    dead = [owner.owner_id for owner in owners.values() if not owner.live]
    return frozenset(dead[: max(0, len(dead) - DEAD_OWNERS_KEPT)])


def moved(before: OwnerRecord | None, after: OwnerRecord) -> Event | None:
    """Tells that an owner has come, was started again, or is gone."""
    if not after.live:
        return Event(kind="owner_lost", text=f"owner {after.owner_id} was silent for longer than the lease")
    if before is None or not before.live or (before.pid, before.restarts) != (after.pid, after.restarts):
        restarts = f", restarted {after.restarts} times" if after.restarts else ""
        return Event(kind="owner_joined", text=f"owner {after.owner_id} at {after.address}{restarts}")
    return None


def drained(owner: OwnerRecord, draining: bool, *, takers: Sequence[str]) -> OwnerRecord:
    """Returns an owner that is to have no new jobs, or jobs again.

    Args:
        owner: The owner.
        draining: Whether it is to have none.
        takers: The names of the owners that take jobs.

    Raises:
        Refusal: FAILED_PRECONDITION: nobody else would take jobs.
    """
    if draining and owner.takes_jobs and set(takers) <= {owner.owner_id}:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"owner {owner.owner_id!r} is the only one that takes jobs; start another one, or undrain one, first",
        )
    return replace(owner, draining=draining)


def draining_event(owner: OwnerRecord, step: int, who: str) -> Event:
    """Tells a run that is at a step that an owner is drained, or no more."""
    kind, what = ("owner_drained", "no new jobs") if owner.draining else ("owner_undrained", "jobs again")
    return Event(kind=kind, text=f"owner {owner.owner_id} gets {what}, asked for at step {step} by {who}")
