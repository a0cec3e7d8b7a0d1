"""Frozen dataclasses of tensors as plain data: one walk over the fields serves wire, checkpoint, digest and devices.

A record's fields are tensors, static values that JSON can hold (numbers, strings, booleans), or records themselves. A
`Literal` field holds one of its words, which is checked on arrival. A tensor field whose metadata says `symmetric`
holds symmetric matrices and travels as packed triangles or, where they are few, as rows whose products they are a sum
of: `{"rows": ROWS}`, `[..., r, d]` for ROWS^T ROWS.

A record travels as a tree, `{"kind": KIND, "fields": {FIELD: VALUE}}`, where KIND is its class's name in a table that
both sides know, and the value of a field that is a record is a tree again.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from kfdist.linalg.psd import pack_triangle, sum_of_products, unpack_triangle
from kfdist.linalg.uploads import sent

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RecordType = TypeVar("RecordType", bound="DataclassInstance")

_WIDEST = 256
"""How much wider than they are many rows may be that travel in the place of their products."""

_LARGEST = 1 << 28
"""Numbers of a sum of products that may be asked for by rows, which are few: 1 GiB in float32, d = 16,384."""

_OF_ROWS = frozenset({torch.float32, torch.float64})
"""What rows are of: sums are made of them, which nothing narrower keeps."""

RecordTree = dict[str, Any]
"""A record ready to travel: `kind` and `fields`."""


def symmetric_field() -> Any:
    """Declares a tensor field of symmetric matrices `[..., d, d]`."""
    return field(metadata={"symmetric": True})


def tensor_fields(record: object) -> dict[str, Tensor]:
    """Returns the tensors of a record by name, in the order of their declaration; those of inner records as `a.b`."""
    return {name: tensor for name, _, tensor in _walk(record)}


def symmetric_fields(record: object) -> frozenset[str]:
    """Returns the names of the tensors that are symmetric matrices, as `tensor_fields` has them."""
    return frozenset(name for name, f, _ in _walk(record) if f.metadata.get("symmetric"))


def _walk(record: object, prefix: str = "") -> Iterator[tuple[str, Field[Any], Tensor]]:
    for f in _fields(type(record)):
        value = getattr(record, f.name)
        if _is_tensor(type(record), f):
            yield prefix + f.name, f, value
        elif _is_record(type(record), f):
            yield from _walk(value, f"{prefix}{f.name}.")


def map_tensors(function: Callable[..., Tensor], record: RecordType, *others: Any) -> RecordType:
    """Returns the record with each tensor replaced by `function` of it, those of inner records too.

    Args:
        function: Takes a tensor of `record` and those at the same place in `others`.
        record: Any record.
        others: Records of the same classes.
    """
    changed: dict[str, Any] = {}
    for f in _fields(type(record)):
        values = [getattr(each, f.name) for each in (record, *others)]
        if _is_tensor(type(record), f):
            changed[f.name] = function(*values)
        elif _is_record(type(record), f):
            changed[f.name] = map_tensors(function, *values)
    return replace(record, **changed)


def move(record: RecordType, device: torch.device | str, dtype: torch.dtype | None = None) -> RecordType:
    """Returns the record with its tensors on `device`, floating-point ones as `dtype`; itself if nothing changes."""

    def moved(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return sent(tensor.to(wanted), device)

    after = map_tensors(moved, record)
    pairs = zip(tensor_fields(record).values(), tensor_fields(after).values(), strict=True)
    return record if all(old is new for old, new in pairs) else after


def contiguous(record: RecordType) -> RecordType:
    """Returns the record with row-major tensors, as they arrive from a journey.

    Matrix products take another path for another memory layout and differ in their last bits.
    """
    return map_tensors(Tensor.contiguous, record)


def make_tree(kind: str, values: Mapping[str, Any]) -> RecordTree:
    """Makes a tree of fields that are packed already.

    Args:
        kind: Name of the record's class in the table of those who will read it.
        values: All its fields; symmetric ones as triangles, records as trees.
    """
    return {"kind": kind, "fields": dict(values)}


def to_tree(record: object, table: Mapping[str, type]) -> RecordTree:
    """Takes a record apart.

    Args:
        record: An instance of a class in `table`.
        table: The classes that the reader knows, by name; those of inner records too.

    Raises:
        ValueError: The class isn't in `table`.
    """
    cls = type(record)
    kind = next((kind for kind, known in table.items() if known is cls), None)
    if kind is None:
        raise ValueError(f"{cls.__name__} is not in the table; known: {', '.join(table)}")
    values: dict[str, Any] = {}
    for f in _fields(cls):
        value = getattr(record, f.name)
        if _is_record(cls, f):
            value = to_tree(value, table)
        elif f.metadata.get("symmetric"):
            value = pack_triangle(value)
        values[f.name] = value
    return make_tree(kind, values)


def from_tree(tree: Any, table: Mapping[str, type]) -> Any:
    """Puts a record together again; its tensors are fresh allocations, so their alignment is always the same.

    Args:
        tree: What `to_tree` returned, perhaps after a journey.
        table: The classes by name.

    Raises:
        ValueError: No tree of a record, an unknown kind, or fields that are missing without having a default, left over
            or of the wrong type.
    """
    if not (isinstance(tree, dict) and tree.keys() == {"kind", "fields"} and isinstance(tree["fields"], dict)):
        raise ValueError(f"{_described(tree)} is no record; it must have a kind and fields")
    kind, values = str(tree["kind"]), tree["fields"]
    if kind not in table:
        raise ValueError(f"unknown record {kind!r}; known: {', '.join(table)}")
    cls = table[kind]
    missing = [f.name for f in _fields(cls) if f.name not in values and f.default is MISSING]
    if missing:
        raise ValueError(f"{kind} lacks its field {missing[0]!r}")
    left_over = sorted(map(str, values.keys() - {f.name for f in _fields(cls)}))
    if left_over:
        raise ValueError(f"{kind} has no fields {', '.join(left_over)}")
    # What has a default came later: payloads in checkpoints may be older.
    return cls(**{f.name: _field_of(kind, f, values[f.name], table) for f in _fields(cls) if f.name in values})


def _field_of(kind: str, f: Field[Any], value: Any, table: Mapping[str, type]) -> Any:
    cls = table[kind]
    if f.metadata.get("symmetric") and isinstance(value, dict):
        return _of_rows(kind, f.name, value)
    if _is_record(cls, f):
        inner = from_tree(value, table)
        if not isinstance(inner, _hint(cls, f)):
            raise ValueError(f"{kind} can't hold a {value['kind']} as {f.name!r}")
        return inner
    if _is_tensor(cls, f) != isinstance(value, Tensor) or isinstance(value, dict | list | tuple | bytes | None):
        wanted = "a tensor" if _is_tensor(cls, f) else "a number, a string, true or false"
        raise ValueError(f"field {f.name!r} of {kind} is {_described(value)}; it must be {wanted}")
    if get_origin(_hint(cls, f)) is Literal and value not in get_args(_hint(cls, f)):
        raise ValueError(f"{f.name} of {kind} is {value!r}, must be one of {', '.join(get_args(_hint(cls, f)))}")
    if f.metadata.get("symmetric"):
        return unpack_triangle(value)
    return value.clone() if isinstance(value, Tensor) else value


def can_travel_as_rows(rows: int, width: int, matrices: int = 1) -> bool:
    """Says whether so many rows of each of some matrices are sent in the place of the triangles of their products.

    They take a quarter of their bytes or less; and not so little that a small payload asks its reader for any memory:
    sums are at most 256 times as large as what travels, and of 2^28 numbers. Readers refuse others.
    """
    return 0 < 8 * rows <= width <= _WIDEST * rows and matrices * width * width <= _LARGEST


def _of_rows(kind: str, name: str, value: dict[Any, Any]) -> Tensor:
    rows = value.get("rows")
    if not isinstance(rows, Tensor) or rows.dim() < 2 or rows.dtype not in _OF_ROWS or value.keys() != {"rows"}:
        raise ValueError(f"field {name!r} of {kind} must be a triangle, or rows alone, of float32 or float64")
    *matrices, count, width = rows.shape
    if not can_travel_as_rows(count, width, math.prod(matrices)):
        raise ValueError(
            f"field {name!r} of {kind} has {count} rows of {width} numbers for {math.prod(matrices)} matrices, which "
            "travel as triangles"
        )
    return sum_of_products(rows)


def _described(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:200]


@cache
def _fields(cls: type) -> tuple[Field[Any], ...]:
    if not is_dataclass(cls):
        raise ValueError(f"{cls.__name__} is not a dataclass")
    return fields(cls)


def _hint(cls: type, f: Field[Any]) -> Any:
    return f.type if not isinstance(f.type, str) else get_type_hints(cls)[f.name]


@cache
def _is_tensor(cls: type, f: Field[Any]) -> bool:
    return _hint(cls, f) is Tensor


@cache
def _is_record(cls: type, f: Field[Any]) -> bool:
    return is_dataclass(_hint(cls, f))
