"""Tensors by name as one safetensors file: written and read without a copy.

The format: eight bytes with the header's length, little-endian; the header, JSON, filled up with blanks to a multiple
of eight; the tensors' bytes, those of the widest numbers first. The files are those of the safetensors library, byte
for byte, which copies every tensor twice.
"""

import json
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The library's names of dtypes, in the order in which it stores them."""

with warnings.catch_warnings():
    # torch says once that a tensor on bytes can't be written to; `views` says so, too.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Returns the parts of the file of some tensors on the CPU, in order; the tensors' are their own memory."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    order = list(names)
    stored = sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in stored:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *(_bytes(tensor) for _, tensor in stored)]


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single number may have any stride
    return flat.view(torch.uint8).numpy().data


def views(content: bytes) -> dict[str, Tensor]:
    """Returns the tensors of a file, without a copy: they are its bytes, and nobody may write to them.

    Raises:
        ValueError: It isn't of the format, or damaged.
        KeyError: A tensor's dtype or place is missing or unknown.
    """
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    described = {name: each for name, each in header.items() if name != "__metadata__"}
    expected, found = 0, {}
    for name, each in sorted(described.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (start, end) = _DTYPES[each["dtype"]], each["shape"], each["data_offsets"]
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"tensor {name!r} is said to have the shape {shape}")
        count = math.prod(shape)
        if start != expected or end - start != count * dtype.itemsize or begin + end > len(content):
            raise ValueError(f"tensor {name!r} of shape {shape} is said to be at bytes {start} to {end}")
        expected = end
        place = torch.frombuffer(content, dtype=dtype, count=count, offset=begin + start) if count else None
        found[name] = (torch.empty(0, dtype=dtype, device="cpu") if place is None else place).view(shape)
    if begin + expected != len(content):
        raise ValueError(f"the tensors end at byte {begin + expected} of {len(content)}")
    return found
