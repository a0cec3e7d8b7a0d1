"""Payloads that are made late: once, by whichever thread asks first, of what was handed over."""

import gc
import os
import threading
import time

import pytest

from kfdist.links.shared_memory import create_input, mapped
from kfdist.types import Job, LateBytes


class Writer:
    """Counts how often it was asked, slowly enough for others to ask meanwhile."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        time.sleep(0.05)
        return b"payload"


def job(content: LateBytes) -> Job:
    return Job(run="r", epoch=1, group="g", version=0, content=content, deadline_seconds=1.0)


def test_nothing_is_made_before_it_is_asked_for_and_then_once_for_all_threads():
    writer = Writer()
    shipped = job(LateBytes(writer))
    assert writer.calls == 0
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(shipped.payload)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"payload"] * 8
    assert writer.calls == 1
    assert shipped.digest == "239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5"


def test_what_the_bytes_were_made_of_is_let_go():
    released = threading.Event()

    class Tensors:
        def __del__(self) -> None:
            released.set()

    def content() -> LateBytes:
        held = Tensors()
        return LateBytes(lambda: str(type(held)).encode())

    late = content()
    assert not released.is_set()
    assert late.value == late.value
    assert released.is_set()


def test_parts_are_hashed_and_counted_without_a_copy_and_joined_once_for_who_wants_them_whole():
    held = bytearray(b"load")
    shipped = job(LateBytes(lambda: [b"pay", memoryview(held)]))
    assert shipped.digest == "239f59ed55e737c77147cf55ad0c1b030b6d7ee748a7426952f9b852d5a935e5"
    assert [bytes(each) for each in shipped.content.parts] == [b"pay", b"load"] and shipped.content.size == 7
    descriptor = create_input(*shipped.content.parts)
    assert os.pread(descriptor, 8, 0) == b"payload"
    os.close(descriptor)
    with pytest.raises(BufferError):
        held.append(0)  # the parts are that memory
    assert shipped.payload is shipped.payload and shipped.payload == b"payload"
    held.append(0)  # joined, they hold nothing else


def test_one_that_could_not_be_made_says_why_whenever_it_is_asked_for():
    late = LateBytes(lambda: b"x" * (1 // 0))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            _ = late.value


def test_bytes_that_moved_to_shared_memory_are_read_there_and_nothing_else_holds_them():
    late = LateBytes(lambda: b"payload" * 1000)
    assert late.size == 7000
    descriptor = create_input(*late.parts)
    shared = mapped(descriptor)
    os.close(descriptor)
    late.move_to(shared)
    assert late.value == b"payload" * 1000 and late.size == 7000
    assert not any(isinstance(each, bytes) for each in gc.get_referents(late.__dict__))
    with pytest.raises(TypeError):
        shared[0] = 1
