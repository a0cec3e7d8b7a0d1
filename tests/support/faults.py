"""A script of faults: what goes wrong in a test, where, and how often. A fault that doesn't happen fails the test.

The fixture `faults` is the script of one test:

    faults.at(rank=2, step=5).kill()
    faults.at(owner="owner-0", inversion=EACH, times=1).delay(20.0)

A place where something can go wrong states by `reach(step=5)` where its process stands; `act_as` has a process state
what it is, such as rank=2. Places outside tests are in `tests/support/faulty/`. The script and the counts of what
happened lie in a folder that every process of a test session inherits by its environment.
"""

import json
import os
import pickle
import random
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

FOLDER, IDENTITY = "TEST_FAULTS_FOLDER", "TEST_FAULTS_IDENTITY"

EACH = range(sys.maxsize)
"""Matches every number: `result=EACH` is every result."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong at the places that match.

    Attributes:
        file: Where it is written down; the files beside it count how often it happened and say that it was lifted.
        where: A value, or a collection of values, by the name of each fact that a place must state to match.
        kind: The method of `Place` that scheduled it.
        value: The arguments of that method.
        times: How often it happens at most, over all processes; None: as often as a place matches.
    """

    file: Path
    where: Mapping[str, Any]
    kind: str
    value: tuple[Any, ...]
    times: int | None

    def __str__(self) -> str:
        where = ", ".join(f"{name}={'EACH' if value == EACH else value}" for name, value in self.where.items())
        return f"at({where}).{self.kind}({', '.join(map(str, self.value))})"

    @property
    def fired(self) -> int:
        """How often it happened so far, over all processes."""
        count = self.file.with_suffix(".fired")
        fired = count.stat().st_size if count.exists() else 0
        return fired if self.times is None else min(fired, self.times)

    def lift(self) -> None:
        """Ends it; it must have happened by now or the test fails all the same."""
        self.file.with_suffix(".lifted").touch()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lift()

    def fires(self, facts: Mapping[str, Any]) -> bool:
        """Says whether it happens at a place, and counts it."""
        if self.file.with_suffix(".lifted").exists():
            return False
        if not all(name in facts and _allows(allowed, facts[name]) for name, allowed in self.where.items()):
            return False
        # One byte a time; a write at the end of a file is atomic, and its position is this firing's number.
        with self.file.with_suffix(".fired").open("ab", buffering=0) as count:
            count.write(b".")
            return self.times is None or count.tell() <= self.times

    def random(self) -> random.Random:
        """Returns this process's random numbers for it: the same in each run of the test."""
        return _GENERATORS.setdefault(self.file, random.Random(f"{self.value} {os.environ.get(IDENTITY)}"))


_GENERATORS: dict[Path, random.Random] = {}


def _allows(allowed: Any, value: Any) -> bool:
    return value in allowed if isinstance(allowed, (range, tuple, set, frozenset)) else value == allowed


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a fault is to happen; a method says which."""

    script: "Faults"
    where: Mapping[str, Any]
    times: int | None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> Fault:
        """A signal to the process itself."""
        return self._schedule("kill", number)

    def stop(self) -> Fault:
        """SIGSTOP to the process itself, which hangs until the test kills it or sends SIGCONT."""
        return self.kill(signal.SIGSTOP)

    def delay(self, least: float, most: float | None = None) -> Fault:
        """A pause of so many seconds, or of a random number between two."""
        return self._schedule("delay", least, least if most is None else most)

    def fail(self, reason: str) -> Fault:
        """What is done there fails and says why."""
        return self._schedule("fail", reason)

    def kill_courier(self) -> Fault:
        """SIGKILL to the rank's courier."""
        return self._schedule("kill_courier")

    def corrupt(self) -> Fault:
        """One byte of what passes there is wrong."""
        return self._schedule("corrupt")

    def late(self, polls: int, *, seed: int = 0) -> Fault:
        """What arrives there is seen only after a random number of looks, `polls` at most."""
        return self._schedule("late", polls, seed)

    def twice(self) -> Fault:
        """What arrives there arrives again."""
        return self._schedule("twice")

    def withhold(self) -> Fault:
        """What arrives there is kept back as long as the place matches and the fault isn't lifted."""
        return self._schedule("withhold")

    def _schedule(self, kind: str, *value: Any) -> Fault:
        file = self.script.folder / f"{uuid.uuid4().hex}.fault"
        fault = Fault(file=file, where=self.where, kind=kind, value=value, times=self.times)
        written = file.with_suffix(".new")
        written.write_bytes(pickle.dumps(fault))
        written.rename(file)
        return fault


_KNOWN: dict[Path, tuple[int, list[Fault]]] = {}
"""The faults that a script had when its folder was last changed, at a time in nanoseconds; places are reached often."""

_SAME_TIME = 100_000_000
"""Nanoseconds in which a folder may change twice and have one time of its last change."""


@dataclass(frozen=True)
class Faults:
    """The script; by default that of the session, which any process of a test may read and add to."""

    folder: Path = field(default_factory=lambda: Path(os.environ[FOLDER]))

    def at(self, *, times: int | None = None, **where: Any) -> Place:
        """Names a place by the facts that it must state, each with the value or values that match."""
        return Place(script=self, where=where, times=times)

    def all(self) -> list[Fault]:
        """Returns every fault, those that were lifted, too."""
        changed = self.folder.stat().st_mtime_ns
        known = _KNOWN.get(self.folder)
        if known is None or known[0] != changed:
            found = [fault for file in sorted(self.folder.glob("*.fault")) if (fault := _read(file)) is not None]
            known = changed, found
            if time.time_ns() - changed > _SAME_TIME:
                _KNOWN[self.folder] = known
        return list(known[1])

    def check(self) -> None:
        """Fails the test where a fault didn't happen.

        Raises:
            AssertionError: Says which ones.
        """
        idle = [str(fault) for fault in self.all() if not fault.fired]
        assert not idle, f"these faults never happened: {'; '.join(idle)}"

    def clear(self) -> None:
        """Forgets everything."""
        for file in self.folder.iterdir():
            file.unlink(missing_ok=True)


@contextmanager
def written_script() -> Iterator[Faults]:
    """Gives the session's script to a test or some of them; at their end it is checked and cleared."""
    script = Faults()
    try:
        yield script
        script.check()
    finally:
        script.clear()


def act_as(**identity: Any) -> dict[str, str]:
    """Returns what a process's environment needs for it to state these facts at every place."""
    return {IDENTITY: json.dumps(identity)}


def reach(*able: str, **facts: Any) -> list[Fault]:
    """Has happen what the script wants here: signals and pauses; returns what the place itself must do.

    Args:
        *able: The other kinds of faults that this place can carry out.
        **facts: Where the process stands.

    Returns:
        Faults of those kinds.
    """
    facts |= json.loads(os.environ.get(IDENTITY, "{}"))
    due = []
    for fault in Faults().all():
        if fault.kind in ("kill", "delay", *able) and fault.fires(facts):
            match fault.kind:
                case "kill":
                    os.kill(os.getpid(), *fault.value)
                case "delay":
                    time.sleep(fault.random().uniform(*fault.value))
                case _:
                    due.append(fault)
    return due


def corrupted(data: bytes | bytearray) -> bytearray:
    """Returns a copy with one bit wrong in the middle."""
    copy = bytearray(data)
    copy[len(copy) // 2] ^= 1
    return copy


def _read(file: Path) -> Fault | None:
    try:
        return pickle.loads(file.read_bytes())
    except FileNotFoundError:  # cleared meanwhile
        return None
