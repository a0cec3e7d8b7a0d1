"""Tensors and a JSON text in one byte string, and the checks on what others sent.

A payload is a safetensors file. Its `__metadata__` has a single entry, a JSON text with sorted keys: several entries
would come out in random order. Tensors are named `INDEX/ROLE/FIELD`, INDEX counting the blocks that the metadata lists.
Equal content gives equal bytes. Nothing is ever unpickled.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 1
"""Moves with every change that an older reader would misread."""

_METADATA_KEY = "kfdist"


def write_payload(content: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Writes a payload.

    Args:
        content: What it is, such as "job"; readers ask for it.
        tensors: By full name, on any device.
        metadata: JSON values; numbers must be finite.
    """
    text = json.dumps({"format": FORMAT, "content": content, **metadata}, sort_keys=True, allow_nan=False)
    # Clones: safetensors refuses tensors that share memory, and a method's state may share it with its result.
    data = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    return save(data, metadata={_METADATA_KEY: text})


def content_of(payload: bytes) -> str:
    """Returns what a payload says it is; empty where it says nothing readable (whoever reads it then says why)."""
    try:
        return str(_metadata(payload).get("content", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def read_metadata(payload: bytes, content: str) -> dict[str, Any]:
    """Reads the metadata alone: eight bytes of length, then JSON (the safetensors format).

    Raises:
        ValueError: The payload is torn, garbage, of another format or of other content.
    """
    try:
        metadata = _metadata(payload)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the payload of {len(payload)} bytes is no kfdist {content}: {error!r}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or metadata.get("content") != content:
        found = {k: metadata.get(k) for k in ("format", "content")} if isinstance(metadata, dict) else metadata
        raise ValueError(f"the payload is {found}, must be a {content} of format {FORMAT}")
    return metadata


def _metadata(payload: bytes) -> Any:
    length = int.from_bytes(payload[:8], "little")
    return json.loads(json.loads(payload[8 : 8 + length])["__metadata__"][_METADATA_KEY])


def read_payload(
    payload: bytes, content: str, *, roles: Collection[str]
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Tensor]]:
    """Reads a payload and checks that each block has a name of its own and each tensor a block.

    Args:
        payload: What `write_payload` returned.
        content: What it must be.
        roles: Roles that tensors may have.

    Returns:
        The metadata, its entries of blocks, and the tensors on the CPU by full name.

    Raises:
        ValueError: It is malformed; the message says what is wrong.
    """
    metadata = read_metadata(payload, content)
    try:
        tensors = load(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"the payload is no safetensors file: {error}") from error
    blocks = metadata.get("blocks")
    if not isinstance(blocks, list) or not blocks:
        raise ValueError(f"blocks are {blocks!r}, must be a list with at least one entry")
    names: set[str] = set()
    for entry in blocks:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"a block is described by {entry!r}, must have a name")
        if entry["name"] in names:
            raise ValueError(f"block {entry['name']!r} is in the payload twice")
        names.add(entry["name"])
    claimed = tuple(f"{index}/{role}/" for index in range(len(blocks)) for role in roles)
    stray = sorted(name for name in tensors if not name.startswith(claimed))
    if stray:
        raise ValueError(f"tensors that belong to no block: {', '.join(stray)}")
    return metadata, blocks, tensors


def add_tensors(tensors: dict[str, Tensor], prefix: str, fields: Mapping[str, Tensor]) -> None:
    """Adds tensors under `INDEX/ROLE`."""
    tensors.update({f"{prefix}/{name}": tensor for name, tensor in fields.items()})


def tensors_under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors under `INDEX/ROLE` by their last name."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in sorted(tensors.items()) if n.startswith(f"{prefix}/")}
