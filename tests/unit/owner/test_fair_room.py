"""Turns by run: whatever is asked for, given back and given up, in whatever order."""

import asyncio
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kfdist.owner.fair_room import FairRoom

LIMIT = 10

ENTERS = st.tuples(st.just("enter"), st.sampled_from("abc"), st.integers(1, 12))
OTHERS = st.tuples(st.sampled_from(["leave", "cancel"]), st.just(""), st.integers(0, 50))


class Watched:
    """A room, and what a careful observer knows of it."""

    def __init__(self, limit: int) -> None:
        self.room = FairRoom(limit)
        self.limit = limit
        self.asked = 0
        self.admitted: list[tuple[str, int]] = []
        self.inside: list[int] = []
        self.waiting: dict[str, list[int]] = {}
        self.first_since: dict[int, int] = {}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.told = 0

    def enter(self, run: str, size: int) -> None:
        number = self.asked = self.asked + 1

        async def go_in() -> None:
            await self.room.enter(run, size)
            self.admitted.append((run, number))
            self.inside.append(size)

        self.tasks[number] = asyncio.create_task(go_in())
        queue = self.waiting.setdefault(run, [])
        queue.append(number)
        if len(queue) == 1:
            self.first_since[number] = len(self.admitted)

    def leave(self, which: int) -> None:
        if self.inside:
            self.room.leave(self.inside.pop(which % len(self.inside)))

    def cancel(self, which: int) -> None:
        numbers = [(run, number) for run, queue in self.waiting.items() for number in queue]
        if numbers:
            run, number = numbers[which % len(numbers)]
            self.tasks[number].cancel()
            self._out_of_the_queue(run, number, len(self.admitted))

    def _out_of_the_queue(self, run: str, number: int, position: int) -> None:
        first, queue = self.waiting[run][0], self.waiting[run]
        queue.remove(number)
        if queue and number == first:
            self.first_since[queue[0]] = position

    def check(self) -> None:
        while self.told < len(self.admitted):
            run, number = self.admitted[self.told]
            assert self.waiting[run][0] == number, "in the order of asking within a run"
            before = Counter(other for other, _ in self.admitted[self.first_since[number] : self.told])
            assert max(before.values(), default=0) <= 1, "each other run at most once before it"
            self.told += 1
            self._out_of_the_queue(run, number, self.told)
        assert len(self.inside) <= 1 or sum(self.inside) <= self.limit
        assert self.inside or not any(self.waiting.values()), "an empty room lets somebody in"


@given(st.lists(st.one_of(ENTERS, ENTERS, OTHERS), max_size=60))
def test_runs_take_turns_and_nobody_waits_for_an_empty_room(operations):
    async def act() -> None:
        watched = Watched(LIMIT)
        for kind, run, number in operations:
            if kind == "enter":
                watched.enter(run, number)
            else:
                getattr(watched, kind)(number)
            for _ in range(4):
                await asyncio.sleep(0)
            watched.check()
        while watched.inside:
            watched.leave(0)
            for _ in range(4):
                await asyncio.sleep(0)
            watched.check()
        assert not any(watched.waiting.values())

    asyncio.run(act())


def test_whoever_is_let_in_and_cancelled_at_once_gives_its_room_back():
    async def act() -> None:
        room = FairRoom(1)
        await room.enter("a", 1)
        second, third = (asyncio.create_task(room.enter(run, 1)) for run in "bc")
        await asyncio.sleep(0)
        room.leave(1)
        second.cancel()
        await asyncio.wait_for(third, 5)
        assert second.cancelled()

    asyncio.run(act())
