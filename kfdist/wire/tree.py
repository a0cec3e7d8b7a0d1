"""Nested state as one safetensors file: tensors beside a JSON skeleton that says where they belong.

Whatever `state_dict()` of a model, an optimizer or a preconditioner returns goes in: dicts, lists, tuples, tensors,
bytes, numbers, strings, None. No pickle is involved, so reading a file from anywhere runs no code.
"""

import json
import math
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from kfdist.errors import CheckpointError

_METADATA_KEY = "kfdist"
_TAGS = frozenset({"$tensor", "$bytes", "$tuple", "$items", "$float"})


def pack(state: Any) -> bytes:
    """Turns nested state into the bytes of a safetensors file; device tensors are copied to the CPU.

    Raises:
        TypeError: Something in it is none of the kinds above; names where it stands.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _take_apart(state, "", tensors)
    text = json.dumps(skeleton, allow_nan=False, separators=(",", ":"))
    return safetensors.torch.save(_without_shared_storage(tensors), metadata={_METADATA_KEY: text})


def unpack(content: bytes) -> Any:
    """Rebuilds what `pack` was given, with all tensors on the CPU.

    Raises:
        CheckpointError: The bytes weren't made by `pack`, or are damaged.
    """
    try:
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
        skeleton = json.loads(header["__metadata__"][_METADATA_KEY])
        return _put_together(skeleton, safetensors.torch.load(content))
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"not a state file of kfdist, or damaged: {error!r}") from error


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
        tensors[path or "."] = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0).byte()
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


def _put_together(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(skeleton, list):
        return [_put_together(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    tag = next(iter(skeleton), "")
    if len(skeleton) != 1 or tag not in _TAGS:
        return {key: _put_together(item, tensors) for key, item in skeleton.items()}
    content: Any = skeleton[tag]
    if tag == "$tensor":
        return tensors[content]
    if tag == "$bytes":
        return tensors[content].numpy().tobytes()
    if tag == "$tuple":
        return tuple(_put_together(item, tensors) for item in content)
    if tag == "$items":
        return {key: _put_together(item, tensors) for key, item in content}
    return float(content)


def _without_shared_storage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies tensors that share memory with an earlier one: safetensors stores each by itself."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return result
