"""Who inverts what: a run's groups, dealt to the owners that take jobs. Pure functions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import grpc

from kfdist.control.control_records import AssignmentRecord
from kfdist.policies.assignment import assign
from kfdist.rpc.status import Refusal
from kfdist.types import GroupName, GroupSpec


@dataclass(frozen=True, kw_only=True)
class Groups:
    """A run's groups and the policy that deals them, as rank 0 registers them."""

    policy: str
    specs: tuple[GroupSpec, ...]


def registered(assignment: AssignmentRecord, groups: Groups, takers: Sequence[str]) -> AssignmentRecord:
    """Deals the groups that a start registers; those of the last start stay dealt as users wanted it."""
    if (assignment.policy, assignment.groups) != (groups.policy, groups.specs):
        assignment = replace(assignment, policy=groups.policy, groups=groups.specs, seconds={})
    return dealt(assignment, takers)


def dealt(assignment: AssignmentRecord, takers: Sequence[str]) -> AssignmentRecord:
    """Deals groups among owners: by their policy, or longest first where users wanted that."""
    if assignment.seconds:
        measured = [replace(spec, cost=assignment.seconds.get(spec.name, spec.cost)) for spec in assignment.groups]
        owner_by_group = assign(measured, takers, "lpt")
    else:
        owner_by_group = assign(assignment.groups, takers, assignment.policy)
    if owner_by_group == assignment.owner_by_group:
        return assignment
    return replace(assignment, owner_by_group=owner_by_group, revision=assignment.revision + 1)


def redealt(
    assignment: AssignmentRecord, measured: Mapping[GroupName, float], takers: Sequence[str]
) -> tuple[AssignmentRecord, str]:
    """Returns groups dealt anew by the seconds of their inversions, and what changes by that, in words.

    Groups of which nothing is known count by their estimated cost, at the others' speed.

    Raises:
        Refusal: FAILED_PRECONDITION: nothing was measured.
    """
    known = {spec: measured[spec.name] for spec in assignment.groups if spec.name in measured}
    if not known:
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"no inversion of run {assignment.run!r} has been measured since the controller began; ask again later",
        )
    speed = sum(known.values()) / (sum(spec.cost for spec in known) or 1.0)
    seconds = {spec.name: known.get(spec, spec.cost * speed) for spec in assignment.groups}
    after = dealt(replace(assignment, seconds=seconds), takers)
    moved = sum(owner != assignment.owner_by_group.get(group) for group, owner in after.owner_by_group.items())
    return after, (
        f"groups dealt anew from {len(known)} measured inversions: {moved} of {len(seconds)} moved; the busiest "
        f"owner has {_busiest(after, seconds):.3g} s of inversions, before {_busiest(assignment, seconds):.3g} s"
    )


def _busiest(assignment: AssignmentRecord, seconds: Mapping[GroupName, float]) -> float:
    """Returns the seconds of inversions that the owner with most of them has."""
    sums: Counter[str] = Counter()
    for group, owner in assignment.owner_by_group.items():
        sums[owner] += seconds.get(group, 0.0)  # pyright: ignore[reportArgumentType] - a Counter of seconds
    return max(sums.values(), default=0.0)
