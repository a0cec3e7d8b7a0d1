"""Payloads survive being cut up; what a header claims is checked before anything is allocated."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.rpc.chunking import Assembler, PayloadError, PayloadTooLarge, digest_of, split
from kfdist.types import CHUNK_BYTES

DIGEST = digest_of(b"")


@given(st.binary(max_size=300), st.integers(1, 64))
def test_round_trip(payload, chunk_bytes):
    chunks = list(split(payload, chunk_bytes=chunk_bytes))
    assert all(0 < len(chunk) <= chunk_bytes for chunk in chunks)
    assembler = Assembler(len(payload), digest_of(payload), limit_bytes=300)
    for chunk in chunks:
        assembler.add(chunk)
    assert assembler.finish() == payload


def test_a_large_payload_of_words_comes_whole():
    payload = memoryview(bytes(range(256)) * (3 * CHUNK_BYTES // 256 + 1)).cast("I")
    chunks = list(split(payload))
    assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES] * 3 + [256]
    assembler = Assembler(payload.nbytes, digest_of(payload), limit_bytes=payload.nbytes)
    for chunk in chunks:
        assembler.add(chunk)
    assert assembler.finish() == payload.tobytes()


@given(st.binary(min_size=1, max_size=100), st.integers(0, 99), st.integers(1, 255))
def test_one_wrong_byte_is_found(payload, place, flip):
    place %= len(payload)
    assembler = Assembler(len(payload), digest_of(payload), limit_bytes=100)
    assembler.add(payload[:place] + bytes([payload[place] ^ flip]) + payload[place + 1 :])
    with pytest.raises(PayloadError, match="SHA-256"):
        assembler.finish()


def test_missing_surplus_and_empty_chunks():
    assembler = Assembler(4, digest_of(b"abcd"), limit_bytes=10)
    assembler.add(b"abc")
    with pytest.raises(PayloadError, match="1 bytes short of the 4"):
        assembler.finish()
    with pytest.raises(PayloadError, match="longer than the 4 bytes"):
        assembler.add(b"de")
    with pytest.raises(PayloadError, match="a chunk has 0 bytes"):
        assembler.add(b"")
    assembler.add(b"d")
    assert assembler.finish() == b"abcd"


def test_a_chunk_over_the_limit_is_refused():
    assembler = Assembler(CHUNK_BYTES + 1, DIGEST, limit_bytes=CHUNK_BYTES + 1)
    with pytest.raises(PayloadError, match=f"1 to {CHUNK_BYTES}"):
        assembler.add(bytes(CHUNK_BYTES + 1))


def test_a_header_alone_allocates_nothing():
    tracemalloc.start()
    try:
        Assembler(1 << 40, DIGEST, limit_bytes=1 << 41)
        with pytest.raises(PayloadTooLarge, match=f"{(1 << 41) + 1}; at most {1 << 41}"):
            Assembler((1 << 41) + 1, DIGEST, limit_bytes=1 << 41)
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("size", "digest", "match"), [(-1, DIGEST, "-1"), (0, "abc", "'abc'"), (0, DIGEST.upper(), "lower-case")]
)
def test_nonsense_headers(size, digest, match):
    with pytest.raises(PayloadError, match=match):
        Assembler(size, digest, limit_bytes=10)
