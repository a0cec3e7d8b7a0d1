"""Nested state as one safetensors file: tensors beside a JSON skeleton that says where they belong.

The one container of kfdist: jobs, results and checkpoints are nested dicts, lists and tuples of tensors, bytes,
numbers, strings and None. No pickle is involved, so reading a file from anywhere runs no code. Equal state, the order
of a dict's keys included, gives equal bytes.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kfdist.wire.container import encode, views

_METADATA_KEY = "kfdist"
_TAGS = frozenset({"$tensor", "$bytes", "$tuple", "$items", "$float"})
_FAULTS = (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)
"""What reading a damaged file, or one that kfdist didn't write, raises."""


def pack(state: Any) -> bytes:
    """Turns nested state into the bytes of a safetensors file; device tensors are copied to the CPU.

    Raises:
        TypeError: Something in it is none of the kinds above; names where it stands.
    """
    return b"".join(pack_parts(state))


def pack_parts(state: Any) -> list[bytes | memoryview]:
    """Returns what `pack` does, in parts: a tensor's on the CPU is its own memory, which must not change any more.

    Raises:
        TypeError: Something in it is none of the kinds above; names where it stands.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _take_apart(state, "", tensors)
    text = json.dumps(skeleton, allow_nan=False, separators=(",", ":"))
    return encode(tensors, {_METADATA_KEY: text})


def unpack(content: bytes, *, share: bool = False) -> Any:
    """Rebuilds what `pack` was given, with all tensors on the CPU.

    Args:
        content: The file.
        share: Make no copies: the tensors are the content's own bytes, and nobody may write to them.

    Raises:
        ValueError: The bytes weren't made by `pack`, or are damaged.
    """
    placed: set[str] = set()
    try:
        skeleton = _read_skeleton(content)
        with torch.device("cpu"):  # empty tensors are made on the default device
            tensors = views(content) if share else safetensors.torch.load(content)

        def leaf(tag: str, name: str) -> Tensor | bytes:
            if name in placed:  # `pack` never does that; few bytes would become any number of copies
                raise ValueError(f"the tensor {name!r} is to stand in two places")
            placed.add(name)
            return tensors[name] if tag == "$tensor" else tensors[name].numpy().tobytes()

        state = _put_together(skeleton, leaf)
    except _FAULTS as error:
        raise ValueError(f"not a state file of kfdist, or damaged: {error!r}") from error
    if placed != tensors.keys():
        stray = ", ".join(sorted(tensors.keys() - placed))
        raise ValueError(f"not a state file of kfdist, or damaged: nothing says where the tensors {stray} belong")
    return state


def outline(content: bytes) -> Any:
    """Reads the header alone: what `unpack` returns, with None in the place of each tensor and each bytes.

    Raises:
        ValueError: The bytes weren't made by `pack`, or are damaged.
    """
    try:
        return _put_together(_read_skeleton(content), lambda tag, name: None)
    except _FAULTS as error:
        raise ValueError(f"not a state file of kfdist, or damaged: {error!r}") from error


def entry(content: bytes, key: str) -> Any:
    """Reads the header alone, and of it one number, string, truth value or None: what a state that is a dict has there.

    Returns:
        None also where it has no such key, isn't a dict, or has something else there.

    Raises:
        ValueError: The bytes weren't made by `pack`, or are damaged.
    """
    try:
        skeleton = _read_skeleton(content)
    except _FAULTS as error:
        raise ValueError(f"not a state file of kfdist, or damaged: {error!r}") from error
    found = skeleton.get(key) if isinstance(skeleton, dict) else None
    return None if isinstance(found, dict | list) else found


def _read_skeleton(content: bytes) -> Any:
    """Reads eight bytes of length, then JSON (the safetensors format), and in its metadata our own."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][_METADATA_KEY])


def _take_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        tensors[path or "."] = value.detach().cpu().contiguous()
        return {"$tensor": path or "."}
    if isinstance(value, bytes | bytearray):
        # torch can't take an empty buffer.
        empty = torch.empty(0, dtype=torch.uint8, device="cpu")
        tensors[path or "."] = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else empty
        return {"$bytes": path or "."}
    if isinstance(value, list | tuple):
        items = [_take_apart(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return _take_dict_apart(value, path, tensors)
    raise TypeError(f"state at {path or '/'} is a {type(value).__name__}; it can't be stored without pickle")


def _take_dict_apart(value: dict[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    for key in value:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise TypeError(f"state at {path or '/'} has the key {key!r}; keys must be strings or integers")
    # Paths are unique: 1 and "1" may both be keys, and a key may have a "/" in it.
    inner = {key: f"{path}/{_escape(key)}" if isinstance(key, str) else f"{path}/#{key}" for key in value}
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {key: _take_apart(item, inner[key], tensors) for key, item in value.items()}
    return {"$items": [[key, _take_apart(item, inner[key], tensors)] for key, item in value.items()]}


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1").replace("#", "~2")


def _put_together(skeleton: Any, leaf: Callable[[str, str], Any]) -> Any:
    """Rebuilds state; `leaf` returns what a tag ("$tensor" or "$bytes") and the name of its tensor stand for."""
    if isinstance(skeleton, list):
        return [_put_together(item, leaf) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    tag = next(iter(skeleton), "")
    if len(skeleton) != 1 or tag not in _TAGS:
        return {key: _put_together(item, leaf) for key, item in skeleton.items()}
    content: Any = skeleton[tag]
    if tag in ("$tensor", "$bytes"):
        return leaf(tag, content)
    if tag == "$tuple":
        return tuple(_put_together(item, leaf) for item in content)
    if tag == "$items":
        return {key: _put_together(item, leaf) for key, item in content}
    return float(content)
