"""The digest of the parameters: any changed bit shows, equal bits always agree."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfdist.bench.measuring import AllocationCounter
from kfdist.linalg.digest import parameter_digest

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex128, torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
BITS_ARE_FREE = [dtype for dtype in DTYPES if dtype is not torch.bool]


def made(dtype: torch.dtype, numbers: int, seed: int = 0) -> Tensor:
    raw = torch.randint(0, 256, (numbers * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype)


def flip(tensor: Tensor, bit: int) -> Tensor:
    """A copy with one bit flipped, counted from the tensor's first byte."""
    raw = tensor.clone().view(torch.uint8)
    raw[bit // 8] ^= 1 << bit % 8
    return raw.view(tensor.dtype)


@pytest.mark.parametrize("dtype", BITS_ARE_FREE, ids=str)
@pytest.mark.parametrize("numbers", [1, 3, 8])
def test_every_single_bit_counts(dtype: torch.dtype, numbers: int):
    tensors = [made(torch.float32, 5), made(dtype, numbers), made(torch.float32, 2)]
    digest = parameter_digest(tensors)
    changed = [
        parameter_digest([tensors[0], flip(tensors[1], bit), tensors[2]]) for bit in range(numbers * dtype.itemsize * 8)
    ]
    assert all(each != digest for each in changed)
    assert len({int(each) for each in changed}) == len(changed)


def test_any_change_of_one_word_counts():
    tensor = made(torch.float64, 3)
    digest = parameter_digest([tensor])
    for first in range(64, 128):
        for second in range(first):
            assert second < 64 or parameter_digest([flip(flip(tensor, first), second)]) != digest
    highest = flip(flip(flip(tensor, 64 + 63), 64 + 34), 64 + 5)  # after mixing, its highest bit alone
    assert parameter_digest([highest]) != digest


@settings(max_examples=200)
@given(st.integers(1, 300), st.data())
def test_two_flipped_bits_count_too(numbers: int, data: st.DataObject):
    tensor = made(torch.float32, numbers)
    bits = data.draw(st.lists(st.integers(0, numbers * 32 - 1), min_size=2, max_size=2, unique=True))
    assert parameter_digest([flip(flip(tensor, bits[0]), bits[1])]) != parameter_digest([tensor])


def test_the_sign_of_zero_and_the_payload_of_nan_count():
    assert parameter_digest([torch.tensor([0.0])]) != parameter_digest([torch.tensor([-0.0])])
    nan = torch.tensor([torch.nan])
    assert parameter_digest([nan]) == parameter_digest([nan.clone()])
    assert parameter_digest([flip(nan, 3)]) != parameter_digest([nan])


def test_places_count():
    tensor = made(torch.float32, 40)
    swapped = tensor.clone()
    swapped[[3, 30]] = tensor[[30, 3]]
    other = made(torch.float32, 40, seed=1)
    assert parameter_digest([swapped]) != parameter_digest([tensor])
    assert parameter_digest([tensor, other]) != parameter_digest([other, tensor])


def test_equal_bits_agree_whatever_the_thread_count_and_memory_layout():
    tensor = made(torch.float32, 300_000).view(3, 100, 1000)
    digests = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            digests.append(int(parameter_digest([tensor])))
    finally:
        torch.set_num_threads(threads)
    digests.append(int(parameter_digest([tensor.mT.contiguous().mT])))
    assert len(set(digests)) == 1


def test_views_into_a_flat_buffer_agree_with_copies():
    """cuDNN's recurrent layers and flat optimizers keep parameters this way, at offsets of any number of bytes."""
    buffer = made(torch.float32, 41)
    views = [buffer[1:9], buffer[9:12], buffer[13:41], buffer[0:0]]
    assert parameter_digest(views) == parameter_digest([view.clone() for view in views])


def test_a_module_has_a_digest():
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    digest = parameter_digest(model.parameters())
    assert (digest.dtype, digest.shape) == (torch.int64, ())
    with torch.no_grad():
        model[2].bias.add_(1e-7)
    assert parameter_digest(model.parameters()) != digest
    assert parameter_digest([]) == 0


def reference_digest(tensors: list[Tensor]) -> int:
    """The definition in Python's integers, which have no width to leave."""
    total = None
    for index, tensor in enumerate(tensors):
        raw = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        raw += bytes(-len(raw) % 8)
        own = 0x14057B7EF767814F * (index + 1)
        for place in range(len(raw) // 8):
            word = int.from_bytes(raw[place * 8 : place * 8 + 8], "little")
            weight = (index + 1 + place) * 0x5851F42D4C957F2D + index * 2 + 1
            own += (word ^ (word >> 29)) * (weight | 1)
        total = own if total is None else total * 31 + own
    assert total is not None
    return (total + 2**63) % 2**64 - 2**63


COUNTS = [*((count, dtype) for count in (1, 12, 13, 200) for dtype in DTYPES), (2000, torch.float32)]
"""A tensor's number is in the same constants whatever its dtype."""


@pytest.mark.parametrize(("count", "dtype"), COUNTS, ids=str)
def test_any_number_of_tensors_has_a_digest(count: int, dtype: torch.dtype):
    """Models have hundreds of parameters; every constant of the digest has to stay inside int64 for all of them."""
    raw = [
        torch.randint(0, 2 if dtype is torch.bool else 256, ((index % 3 + 1) * dtype.itemsize,))
        for index in range(count)
    ]
    tensors = [each.to(torch.uint8).view(dtype) for each in raw]
    digest = parameter_digest(tensors)
    assert int(digest) == reference_digest(tensors)
    last = tensors[-1].clone().view(torch.uint8)
    last[0] ^= 1
    assert parameter_digest([*tensors[:-1], last.view(dtype)]) != digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_large_tensor_takes_no_more_memory_than_a_piece_of_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """And its digest isn't another one: those of ranks with other devices, and of before, are compared to it."""
    tensors = [made(dtype, 3), made(dtype, 40_003)[1:], made(dtype, 5)]
    whole = parameter_digest(tensors)
    monkeypatch.setattr("kfdist.linalg.digest._AT_ONCE", {"": 64})
    with AllocationCounter() as counter:
        digest = parameter_digest(tensors)
    assert counter.peak_bytes <= 8 * 64 * 8
    assert int(digest) == int(whole) == reference_digest(tensors)
