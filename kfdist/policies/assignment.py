"""Who does what: groups dealt to owners and to courier ranks. Pure functions, the same answer in every process."""

import hashlib
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from kfdist import checks
from kfdist.errors import ConfigError
from kfdist.types import GroupName, GroupSpec

Policy = Callable[[Sequence[GroupSpec], Sequence[str]], dict[GroupName, str]]


def assign(groups: Sequence[GroupSpec], owners: Sequence[str], policy: str = "round_robin") -> dict[GroupName, str]:
    """Deals every group to one owner.

    The order of the arguments doesn't matter: the result is a function of the two sets.

    Args:
        groups: The run's groups.
        owners: Names of the live owners; with none, nothing is dealt.
        policy: A name in POLICIES.

    Returns:
        The owner of each group; empty without owners.

    Raises:
        ConfigError: The policy is unknown, a name comes twice, or a cost is no number of operations.
    """
    checks.choice("cluster.assignment", policy, POLICIES)
    _check(groups)
    if len(set(owners)) != len(owners):
        raise ConfigError(f"owners have {len(owners) - len(set(owners))} repeated names; each must come once")
    return POLICIES[policy](groups, sorted(owners)) if owners else {}


def courier_ranks(groups: Sequence[GroupSpec], world_size: int) -> dict[GroupName, int]:
    """Deals every group to the rank whose courier carries it, so that the ranks carry equally many bytes.

    Longest processing time first: the largest group goes to the rank that has least so far. No rank gets more than 4/3
    of what the best deal would give its busiest one (Graham 1969).

    Args:
        groups: The run's groups.
        world_size: How many ranks there are.

    Raises:
        ConfigError: A name comes twice, a size is negative, or there is no rank.
    """
    checks.count("world_size", world_size, least=1)
    _check(groups)
    bins = _longest_first(groups, world_size, attrgetter("bytes"))
    return {group.name: index for group, index in bins}


def rendezvous(group: GroupName, owners: Sequence[str]) -> list[str]:
    """Orders owners by their claim on a group: highest random weight first (Thaler and Ravishankar 1998).

    Every process that knows the same owners makes the same choice without asking anyone. When an owner goes, only its
    groups move, and they spread over the others.

    Args:
        group: The group.
        owners: Names of the live owners.
    """
    return sorted(owners, key=lambda owner: (_weight(group, owner), owner), reverse=True)


def _weight(group: GroupName, owner: str) -> bytes:
    # The length keeps ("ab", "c") and ("a", "bc") apart.
    return hashlib.sha256(f"{len(group)}:{group}:{owner}".encode()).digest()


def _round_robin(groups: Sequence[GroupSpec], owners: Sequence[str]) -> dict[GroupName, str]:
    dearest_first = sorted(groups, key=lambda group: (-group.cost, group.position, group.name))
    return {group.name: owners[index % len(owners)] for index, group in enumerate(dearest_first)}


def _model_order(groups: Sequence[GroupSpec], owners: Sequence[str]) -> dict[GroupName, str]:
    in_order = sorted(groups, key=attrgetter("position", "name"))
    return {group.name: owners[index % len(owners)] for index, group in enumerate(in_order)}


def _lpt(groups: Sequence[GroupSpec], owners: Sequence[str]) -> dict[GroupName, str]:
    return {group.name: owners[index] for group, index in _longest_first(groups, len(owners), attrgetter("cost"))}


def _longest_first(
    groups: Sequence[GroupSpec], bins: int, size: Callable[[GroupSpec], float]
) -> list[tuple[GroupSpec, int]]:
    loads = [(0.0, 0, index) for index in range(bins)]  # the count breaks ties, so that empty groups spread as well
    dealt = []
    for group in sorted(groups, key=lambda group: (-size(group), group.position, group.name)):
        load, count, index = loads[0]
        heapq.heapreplace(loads, (load + size(group), count + 1, index))
        dealt.append((group, index))
    return dealt


def _check(groups: Sequence[GroupSpec]) -> None:
    seen: set[GroupName] = set()
    for group in groups:
        if group.name in seen:
            raise ConfigError(f"group {group.name!r} comes twice; names must be unique in a run")
        seen.add(group.name)
        if not (math.isfinite(group.cost) and group.cost >= 0):
            raise ConfigError(
                f"group {group.name!r} has cost {group.cost}; it must be a number of operations, 0 or more"
            )
        if group.bytes < 0:
            raise ConfigError(f"group {group.name!r} has {group.bytes} bytes; it must be 0 or more")


POLICIES: Mapping[str, Policy] = {
    "round_robin": _round_robin,  # over groups sorted by cost
    "model_order": _model_order,
    "lpt": _lpt,  # longest processing time first
}
"""How groups may be dealt to owners, by name."""
