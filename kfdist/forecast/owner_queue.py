"""How old inverses get: the owners' queues, step by step, with the run's own schedule, assignment and protocol.

A step takes a fixed time, an inversion its predicted one, and sending nothing. Each owner inverts one job at a time, in
the order in which they come; of each group one job is under way and one waits, and a newer one takes its place.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kfdist.policies.assignment import assign
from kfdist.policies.schedule import Schedule
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.types import GroupName

_PERIODS, _UNCOUNTED = 14, 4
"""Inverse periods that are played, and how many of them, at first, aren't counted."""


_COLLECT, _DUE = 0, 1
"""What happens at a step, in its order: results are taken in, then jobs are shipped."""


@dataclass(frozen=True, kw_only=True)
class Ages:
    """How old the inverses in use get.

    Attributes:
        steps: The largest staleness of any block, in steps.
        steps_by_period: The largest of the blocks with each period, by the steps between two inverses.
        mean_steps: The mean over steps and blocks.
        delay_steps: The largest number of steps from statistics to their adoption.
        replaced: Jobs that never ran as a newer one took their place, of all.
        first_seconds: How long the first step waits for the first inverses.
        busy: By owner, the share of its time that it inverts.
    """

    steps: int
    steps_by_period: Mapping[int, int]
    mean_steps: float
    delay_steps: int
    replaced: float
    first_seconds: float
    busy: tuple[float, ...]


@dataclass
class _Owner:
    free_at: float = 0.0
    busy: float = 0.0


@dataclass
class _Group:
    """A group and its jobs; steps at which versions are adopted, with the versions, are kept for later."""

    owner: _Owner
    seconds: float
    period: int
    index: int
    running: int | None = None
    waiting: int | None = None
    adopted: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    def start(self, version: int, now: float) -> float:
        """Puts a job at the end of the owner's queue, and returns when it is done."""
        self.running = version
        self.owner.free_at = max(self.owner.free_at, now) + self.seconds
        self.owner.busy += self.seconds
        return self.owner.free_at


def deal(groups: Sequence[BlockGroup], owners: int, policy: str) -> dict[GroupName, int]:
    """Returns the number of each group's owner, by the rule that a run uses.

    Args:
        groups: Those that owners invert.
        owners: How many owners there are.
        policy: `cluster.assignment`.
    """
    width = len(str(owners))
    names = [f"owner-{index:0{width}d}" for index in range(owners)]
    dealt = assign([group.spec for group in groups], names, policy)
    return {name: names.index(owner) for name, owner in dealt.items()}


def play(
    groups: Sequence[BlockGroup],
    schedule: Schedule,
    owner_of: Mapping[GroupName, int],
    seconds: Callable[[BlockGroup], float],
    step_seconds: float,
    delay: int,
) -> Ages:
    """Plays some inverse periods of a run.

    Args:
        groups: Those that owners invert; at least one.
        schedule: When they are due.
        owner_of: The number of each one's owner.
        seconds: How long an inversion of a group takes.
        step_seconds: How long a step takes.
        delay: Steps from statistics to adoption, of an inversion that takes less than a step (`usual_delay`).
    """
    owners = [_Owner() for _ in range(max(owner_of.values()) + 1)]
    states = [
        _Group(
            owner=owners[owner_of[group.name]],
            seconds=seconds(group),
            period=group.inverter.update_period(schedule.factor_period, schedule.inverse_period),
            index=group.index,
        )
        for group in groups
    ]
    first = _first_step(states, owners)
    steps, begin = _PERIODS * schedule.inverse_period, _UNCOUNTED * schedule.inverse_period
    jobs = replaced = 0
    events = [
        (step, _DUE, number) for number, state in enumerate(states) for step in _due_steps(schedule, state, steps)
    ]
    heapq.heapify(events)
    while events:
        step, kind, number = heapq.heappop(events)
        state, now, done = states[number], first + step * step_seconds, None
        if kind == _DUE:
            jobs += step >= begin
            replaced += step >= begin and state.waiting is not None
            if state.running is None:
                done = state.start(step, now)
            else:
                state.waiting = step
        else:
            assert state.running is not None, "what is collected has run"
            state.adopted.append((step + delay - 1, state.running))  # the first step of the delay was until here
            state.running, waiting, state.waiting = None, state.waiting, None
            if waiting is not None:
                done = state.start(waiting, now)
        if done is not None:
            heapq.heappush(events, (max(step + 1, math.ceil((done - first) / step_seconds)), _COLLECT, number))
            if events[0][0] >= steps:
                break
    total = first + steps * step_seconds
    return _ages(states, owners, range(begin, steps), first, total, delay, replaced / max(jobs, 1))


def _due_steps(schedule: Schedule, state: _Group, end: int) -> range:
    """Returns the steps after the first one at which a group has a job."""
    return range(schedule.phase(state.index) % state.period or state.period, end, state.period)


def _first_step(states: Sequence[_Group], owners: Sequence[_Owner]) -> float:
    """All groups are inverted at step 0, which waits for them."""
    for state in states:
        state.start(0, 0.0)
        state.running = None
    return max(owner.free_at for owner in owners)


def _ages(
    states: Sequence[_Group],
    owners: Sequence[_Owner],
    counted: range,
    first: float,
    total: float,
    delay: int,
    replaced: float,
) -> Ages:
    """Reads ages off the adoptions: from one to the next, an inverse ages by a step each step."""
    oldest, summed, delays = defaultdict[int, int](int), 0.0, [delay]
    begin, end = counted.start, counted.stop
    for state in states:
        following = [*(at for at, _ in state.adopted[1:]), end]
        for (at, version), until in zip(state.adopted, following, strict=True):
            since, last = max(at, begin), min(until, end) - 1
            if last >= since:
                oldest[state.period] = max(oldest[state.period], last - version)
                summed += (since + last - 2 * version) * (last - since + 1) / 2
            if begin <= at < end and at:
                delays.append(at - version)
    return Ages(
        steps=max(oldest.values()),
        steps_by_period=dict(oldest),
        mean_steps=summed / ((end - begin) * len(states)),
        delay_steps=max(delays),
        replaced=replaced,
        first_seconds=first,
        busy=tuple(min(1.0, owner.busy / total) for owner in owners),
    )
