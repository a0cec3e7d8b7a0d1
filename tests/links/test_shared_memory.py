"""Memory that rank and courier share: inputs nobody can change, results that are copied before they are believed."""

import os

import pytest

from kfdist.links.shared_memory import HeartbeatWord, create_input, create_output, read_private, write_at


@pytest.fixture
def output():
    descriptor = create_output()
    yield descriptor
    os.close(descriptor)


def test_an_input_can_be_read_and_not_changed():
    descriptor = create_input(b"payload")
    try:
        assert read_private(descriptor, 7) == b"payload"
        with pytest.raises(PermissionError):
            os.pwrite(descriptor, b"P", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 3)
    finally:
        os.close(descriptor)


def test_an_empty_input():
    descriptor = create_input(b"")
    assert read_private(descriptor, 0) == b""
    os.close(descriptor)


def test_what_was_read_is_a_copy(output):
    write_at(output, 0, bytearray(b"result"))
    read = read_private(output, 6)
    write_at(output, 0, b"broken")
    assert read == b"result"


@pytest.mark.parametrize("announced", [5, 7])
def test_another_size_than_announced(output, announced):
    write_at(output, 0, b"result")
    with pytest.raises(ValueError, match=f"holds 6 bytes where {announced} were announced"):
        read_private(output, announced)


def test_nothing_lies_in_dev_shm(output):
    before = set(os.listdir("/dev/shm"))
    write_at(output, 0, bytes(1 << 20))
    descriptor = create_input(bytes(1 << 20))
    assert set(os.listdir("/dev/shm")) == before
    os.close(descriptor)


def test_the_heartbeat_word_is_seen_by_the_other_side():
    descriptor = HeartbeatWord.create()
    with HeartbeatWord(descriptor) as writer, HeartbeatWord(descriptor) as reader:
        assert reader.value == 0
        writer.beat()
        writer.beat()
        assert reader.value == 2
    os.close(descriptor)
