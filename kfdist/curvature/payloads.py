"""What a job, a result and a chain look like as nested state, and the checks on what another process sent.

Each is packed by `kfdist.wire.tree`, its records as in `kfdist.wire.records`:

    job     {"inverter": {"name", "settings"}, "damping", "threads",
             "blocks": [{"name", "seed", "statistics": record, "previous": {name: tensor}}]}
    result  {"blocks": [{"name", "outcome", "reason", "diagnostics", "preconditioner": record or None,
                         "state": {name: tensor}}]}
    chain   {"jobs": [bytes of a job]}

with "format" and "content" beside.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfdist.checks import is_number
from kfdist.wire.records import from_tree
from kfdist.wire.tree import entry, outline, unpack

FORMAT = 3
"""Moves with every change that an older reader would misread."""

Tree = dict[str, Any]
"""A job, a chain, a result or a block of one, unpacked."""

_MOST_QUOTED = 200

_PARTS = {
    "job": {"inverter", "damping", "threads", "blocks"},
    "chain": {"jobs"},
    "result": {"blocks"},
}
_BLOCK_PARTS = {
    "job": {"name", "seed", "statistics", "previous"},
    "result": {"name", "outcome", "reason", "diagnostics", "preconditioner", "state"},
}


def make(content: str, **parts: Any) -> Tree:
    """Makes the state of a job, a chain or a result, to be packed."""
    return {"format": FORMAT, "content": content, **parts}


def plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors as they arrive from a journey: row-major, on the CPU, in the order of their names."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}


def read_head(payload: bytes, content: str) -> Tree:
    """Reads a payload without its tensors, and checks that it is what it must be.

    Raises:
        ValueError: It is torn, garbage, of another format or of other content.
    """
    head = _opened(outline, payload, content)
    _check_head(head, content)
    return head


def read(payload: bytes, content: str) -> Tree:
    """Reads a payload, and checks that it has the parts it must have and each block a name that no other has.

    Its tensors are the payload's own bytes; nobody may write to them. `record` and `tensors` make copies.

    Raises:
        ValueError: It is malformed; the message says what is wrong.
    """
    try:
        tree = _opened(partial(unpack, share=True), payload, content)
    except ValueError:
        read_head(payload, content)  # of another format or content, it says so
        raise
    _check_head(tree, content)
    _refuse_other_parts(f"the {content}", tree.keys() - {"format", "content"}, _PARTS[content])
    if content in _BLOCK_PARTS:
        _check_blocks(tree.get("blocks"), _BLOCK_PARTS[content])
    return tree


def _check_head(tree: Any, content: str) -> None:
    found = {key: tree.get(key) for key in ("format", "content")} if isinstance(tree, dict) else tree
    if found != {"format": FORMAT, "content": content}:
        raise ValueError(f"the payload is {shortened(found)}, must be a {content} of format {FORMAT}")


def _opened(reader: Callable[[bytes], Any], payload: bytes, content: str) -> Any:
    try:
        return reader(payload)
    except ValueError as error:
        raise ValueError(f"the payload of {len(payload)} bytes is no kfdist {content}: {error}") from error


def _check_blocks(blocks: object, parts: set[str]) -> None:
    if not isinstance(blocks, list) or not blocks:
        raise ValueError(f"blocks are {shortened(blocks)}, must be a list with at least one entry")
    names: set[str] = set()
    for block in blocks:
        if not isinstance(block, dict) or not isinstance(block.get("name"), str):
            raise ValueError(f"a block is described by {shortened(block)}, must have a name")
        if block["name"] in names:
            raise ValueError(f"block {block['name']!r} is in the payload twice")
        names.add(block["name"])
        _refuse_other_parts(f"block {block['name']!r}", block.keys(), parts)


def _refuse_other_parts(whole: str, found: Iterable[object], known: set[str]) -> None:
    unknown = sorted(str(part) for part in found if part not in known)
    if unknown:
        raise ValueError(
            f"{whole} has parts that nobody reads: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )


def links(payload: bytes) -> list[bytes]:
    """Takes a chain apart; any other payload is a chain of one, and whoever reads it says what is wrong with it."""
    try:
        if entry(payload, "content") != "chain":
            return [payload]
    except ValueError:
        return [payload]
    jobs = read(payload, "chain").get("jobs")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(job, bytes) for job in jobs):
        raise ValueError(f"the chain's jobs are {shortened(jobs)}, must be a list of the bytes of at least one job")
    return jobs


def record(block: Tree, part: str, table: Mapping[str, type]) -> Any:
    """Puts the record in a part of a block together.

    Raises:
        ValueError: It doesn't fit its class in `table`; the message names the block.
    """
    try:
        return from_tree(block.get(part), table)
    except ValueError as error:
        raise ValueError(f"block {block['name']!r}: {part}: {error}") from error


def tensors(block: Tree, part: str, device: torch.device | str) -> dict[str, Tensor]:
    """Returns a part of a block that is tensors by name: fresh allocations, so that their alignment is always the same.

    Raises:
        ValueError: It is something else.
    """
    found = block.get(part)
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"block {block['name']!r}: {part} is {shortened(found)}, must be tensors by name")
    return {name: tensor.clone().to(device) for name, tensor in found.items()}


def numbers(block: Tree, part: str) -> dict[str, float]:
    """Returns a part of a block that is finite numbers by name.

    Raises:
        ValueError: It is something else.
    """
    found = block.get(part)
    if not isinstance(found, dict) or not all(is_number(each) and math.isfinite(each) for each in found.values()):
        raise ValueError(f"block {block['name']!r}: {part} is {shortened(found)}, must be finite numbers by name")
    return found


def shortened(value: object) -> str:
    """Returns a value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}..."
