"""The container is safetensors' own, byte for byte, and is read without a copy."""

import json

import pytest
import safetensors.torch
import torch

from kfdist.wire.container import encode, views

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
]
SHAPES = [(), (3,), (2, 0), (5, 7)]
TENSORS = {
    f'{index}/{dtype}/ä"': torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(2).to(dtype)
    for dtype in DTYPES
    for index, shape in enumerate(SHAPES)
}
METADATA = {"kfdist": '{"a": "ä"}'}


def test_it_writes_what_safetensors_writes():
    assert b"".join(encode(TENSORS, METADATA)) == safetensors.torch.save(TENSORS, METADATA)
    assert b"".join(encode({}, METADATA)) == safetensors.torch.save({}, METADATA)


def test_it_writes_tensors_of_any_layout_and_those_that_share_memory():
    whole = torch.arange(12.0).view(3, 4)
    given = {"rows": whole[1:], "transposed": whole.mT, "one": whole[1:2, 2:3].mT, "all": whole}
    apart = {name: tensor.contiguous().clone() for name, tensor in given.items()}
    assert b"".join(encode(given, METADATA)) == safetensors.torch.save(apart, METADATA)


def test_what_is_read_is_the_content_itself():
    content = b"".join(encode(TENSORS, METADATA))
    found = views(content)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tolist() == tensor.tolist()
    begin = torch.frombuffer(bytearray(content), dtype=torch.uint8).numel()
    addresses = [tensor.data_ptr() for tensor in found.values() if tensor.numel()]
    assert max(addresses) - min(addresses) < begin


@pytest.mark.parametrize(
    "place",
    [
        {"data_offsets": [0, 8]},
        {"data_offsets": [4, 16]},
        {"shape": [4]},
        {"dtype": "F64"},
        {"dtype": "X8"},
        {"shape": [-1, -3]},
        {"shape": [3.0]},
        # The triangle of a factor of a million dimensions, which would take two terabytes.
        {"shape": [500_000_500_000], "data_offsets": [0, 2_000_002_000_000]},
    ],
)
def test_a_place_that_cannot_be_is_refused(place: dict[str, object]):
    content = b"".join(encode({"a": torch.ones(3)}, {}))
    header = json.loads(content[8 : 8 + content[0]])
    header["a"] |= place
    text = json.dumps(header).encode()
    with pytest.raises((ValueError, KeyError)):
        views(len(text).to_bytes(8, "little") + text + bytes(12))


def test_what_is_cut_off_or_goes_on_is_refused():
    content = b"".join(encode({"a": torch.ones(3)}, {}))
    for damaged in (content[:-4], content + b"\0"):
        with pytest.raises(ValueError, match="byte"):
            views(damaged)
