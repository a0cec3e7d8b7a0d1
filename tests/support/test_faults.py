"""The instrument itself: what matches happens and is counted over all processes; what doesn't happen fails the test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.faults import EACH, FOLDER, IDENTITY, Faults, act_as, corrupted, reach, written_script

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return Faults()


def run(code: str, **identity: object) -> int:
    """Runs code in another process that is given this identity; returns its exit status."""
    lines = f"from tests.support.faults import reach\n{code}"
    return subprocess.run([sys.executable, "-c", lines], cwd=ROOT, env={**os.environ, **act_as(**identity)}).returncode


def test_a_fault_that_never_happens_fails_the_test_and_is_named(script: Faults) -> None:
    reach(step=4)
    with pytest.raises(AssertionError, match=r"never happened: at\(rank=2, result=EACH\)\.late\(7, 0\)"):
        with written_script() as faults:
            faults.at(rank=2, result=EACH).late(7)
            faults.at(step=5).delay(0.0)
            reach(step=5)
    assert script.all() == []


def test_a_test_that_fails_by_itself_says_why_and_leaves_no_fault_to_the_next(script: Faults) -> None:
    with pytest.raises(ValueError, match="why"), written_script() as faults:
        faults.at(step=5).kill()
        raise ValueError("why")
    assert script.all() == []


@pytest.mark.parametrize(
    ("where", "facts", "matches"),
    [
        ({"step": 5}, {"step": 5, "more": 1}, True),
        ({"step": 5}, {"step": 6}, False),
        ({"step": 5}, {}, False),
        ({"step": 5, "group": "a"}, {"step": 5, "group": "b"}, False),
        ({"step": EACH}, {"step": 123}, True),
        ({"step": range(8, 100, 2)}, {"step": 9}, False),
        ({"group": ("a", "b")}, {"group": "b"}, True),
        ({}, {}, True),
    ],
)
def test_all_facts_that_are_named_must_be_stated_with_a_value_that_is_allowed(script, where, facts, matches) -> None:
    fault = script.at(**where).twice()
    assert reach("twice", **facts) == [fault] * matches
    assert fault.fired == matches


def test_a_place_that_cannot_carry_it_out_does_not_count_it(script: Faults) -> None:
    fault = script.at(step=EACH).corrupt()
    assert reach(step=1) == reach("late", step=1) == []
    assert fault.fired == 0


def test_a_lifted_fault_happens_no_more_and_must_have_happened(script: Faults) -> None:
    with script.at(step=EACH).withhold() as fault:
        assert reach("withhold", step=1) == [fault]
    assert reach("withhold", step=2) == []
    script.check()
    script.at(step=9).withhold().lift()
    with pytest.raises(AssertionError, match="step=9"):
        script.check()


def test_other_processes_state_who_they_are_and_their_faults_are_counted_here(script: Faults) -> None:
    kill, crash, never = (
        script.at(rank=1).kill(),
        script.at(rank=2, step=3).kill(signal.SIGABRT),
        script.at(rank=3).kill(),
    )
    assert run("reach(step=3)", rank=0) == 0
    assert run("reach()", rank=1) == -signal.SIGKILL
    assert run("reach(step=2); reach(step=3)", rank=2) == -signal.SIGABRT
    assert [fault.fired for fault in (kill, crash, never)] == [1, 1, 0]


def test_it_happens_so_many_times_over_all_processes_at_once(script: Faults) -> None:
    fault = script.at(number=EACH, times=30).corrupt()
    code = "print(sum(len(reach('corrupt', number=n)) for n in range(20)))"
    command = [sys.executable, "-c", f"from tests.support.faults import reach\n{code}"]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(int(process.communicate()[0]) for process in processes) == fault.fired == 30


def test_a_process_may_schedule_and_lift_what_others_meet(script: Faults) -> None:
    assert run("from tests.support.faults import Faults\nFaults().at(step=1).twice()\nreach('twice', step=1)") == 0
    (fault,) = script.all()
    assert (fault.fired, reach("twice", step=1)) == (1, [fault])
    fault.lift()
    assert run("assert reach('twice', step=1) == []") == 0


def test_a_delay_takes_its_time(script: Faults) -> None:
    script.at(step=1).delay(0.5, 0.6)
    begun = time.monotonic()
    reach(step=2)
    between = time.monotonic()
    reach(step=1)
    assert between - begun < 0.5 <= time.monotonic() - between


def test_random_numbers_are_the_same_in_each_run_and_others_in_each_process(script: Faults, monkeypatch) -> None:
    def drawn(seed: int, rank: int) -> list[int]:
        monkeypatch.setenv(IDENTITY, act_as(rank=rank)[IDENTITY])
        numbers = script.at(result=EACH).late(1000, seed=seed).random()
        return [numbers.randint(0, 1000) for _ in range(5)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(seed, rank)) for seed in range(3) for rank in range(3)}) == 9


def test_corruption_is_one_bit() -> None:
    data = bytes(range(7))
    wrong = corrupted(data)
    assert sum((a ^ b).bit_count() for a, b in zip(data, wrong, strict=True)) == 1
