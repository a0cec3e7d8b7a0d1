"""What memory there is: the least of what the machine, control groups and the process's own limits leave."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kfdist.system import memory
from kfdist.system.memory import Memory, available_memory, in_words


def test_the_machine_sets_a_limit_that_ranks_share(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_machine", lambda: iter([Memory(600, "the machine's memory")]))
    monkeypatch.setattr(memory, "_control_groups", lambda: iter([Memory(1000, "a group")]))
    monkeypatch.setattr(memory, "_own_limits", lambda: iter([Memory(500, "RLIMIT_AS")]))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_memory() == Memory(500, "RLIMIT_AS")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_memory() == Memory(300, "the machine's memory, shared by 2 ranks")


def test_what_this_machine_has():
    (machine,) = memory._machine()
    assert 1 << 20 < machine.bytes < 1 << 50
    assert 0 < available_memory().bytes <= machine.bytes


def test_an_address_space_of_ones_own(monkeypatch: pytest.MonkeyPatch):
    limits = {resource.RLIMIT_AS: 1 << 50, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda number: (limits[number], limits[number]))
    (left,) = memory._own_limits()
    assert (1 << 50) - (1 << 45) < left.bytes < 1 << 50 and "ulimit -v" in left.limit


def test_a_control_group_leaves_its_limit_without_what_is_used_and_can_not_be_dropped(tmp_path: Path):
    for name, text in {"max": "1000\n", "current": "700\n", "stat": "anon 500\ninactive_file 150\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    files = ("memory.max", "memory.current", "inactive_file")
    (left,) = memory._left_in(tmp_path, *files)
    assert left == Memory(450, "the limit of 1000 bytes of the control group")
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._left_in(tmp_path, *files)) == []
    assert list(memory._left_in(tmp_path / "none", *files)) == []


def test_bytes_in_words():
    assert [in_words(size) for size in (12, 2048, 3 << 20, 14 << 30)] == ["12 B", "2 KiB", "3 MiB", "14 GiB"]


GAPS = """
import mmap
from kfdist.system import memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * mmap.PAGESIZE
size, number = 1 << 16, 1000  # below what malloc maps on its own
kept = [bytearray(b"x") * size for _ in range(number)]
last = bytearray(b"x") * size
del kept
before, free = resident(), memory.FreeMemory()
free.passed(memory._TRIMMED_EVERY - 1)
between = resident()
free.passed(1)
assert between > before - size * number // 10, "nothing came and went yet"
print((before - resident()) / (size * number))
"""


def test_what_malloc_keeps_is_given_back_when_enough_has_come_and_gone():
    done = subprocess.run([sys.executable, "-c", GAPS], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.8


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: object())
    assert not memory.give_back()
