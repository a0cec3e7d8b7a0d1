"""Frozen dataclasses of tensors as plain data: one walk over the fields serves wire, checkpoint, digest and devices.

A record's fields are tensors, or static values that JSON can hold (numbers, strings, booleans). A tensor field whose
metadata says `symmetric` holds symmetric matrices and travels as packed triangles.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from kfdist.linalg.psd import pack_triangle, unpack_triangle

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Static = float | int | str | bool
RecordType = TypeVar("RecordType", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class PackedRecord:
    """A record ready to travel.

    Attributes:
        kind: Name of its class in the table that the reader uses.
        tensors: Tensor fields by name, symmetric ones packed.
        static: Static fields by name.
    """

    kind: str
    tensors: dict[str, Tensor]
    static: dict[str, Static]


def symmetric_field() -> Any:
    """Declares a tensor field of symmetric matrices `[..., d, d]`."""
    return field(metadata={"symmetric": True})


def tensor_fields(record: object) -> dict[str, Tensor]:
    """Returns the tensor fields of a record by name, in the order of their declaration."""
    return {f.name: getattr(record, f.name) for f in _fields(type(record)) if _is_tensor(type(record), f)}


def static_fields(record: object) -> dict[str, Static]:
    """Returns the other fields of a record by name, in the order of their declaration."""
    return {f.name: getattr(record, f.name) for f in _fields(type(record)) if not _is_tensor(type(record), f)}


def symmetric_fields(record: object) -> frozenset[str]:
    """Returns the names of the fields that hold symmetric matrices."""
    return frozenset(f.name for f in _fields(type(record)) if f.metadata.get("symmetric"))


def move(record: RecordType, device: torch.device | str, dtype: torch.dtype | None = None) -> RecordType:
    """Returns the record with its tensors on `device`, floating-point ones as `dtype`; itself if nothing changes."""
    non_blocking = torch.device(device).type != "cpu"  # nothing would tell the host when it may read

    def moved(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=wanted, non_blocking=non_blocking)

    before = tensor_fields(record)
    after = {name: moved(tensor) for name, tensor in before.items()}
    if all(after[name] is before[name] for name in before):
        return record
    return replace(record, **after)


def contiguous(record: RecordType) -> RecordType:
    """Returns the record with row-major tensors, as they arrive from a journey.

    Matrix products take another path for another memory layout and differ in their last bits.
    """
    return replace(record, **{name: tensor.contiguous() for name, tensor in tensor_fields(record).items()})


def pack(record: object, table: Mapping[str, type]) -> PackedRecord:
    """Takes a record apart.

    Args:
        record: An instance of a class in `table`.
        table: The classes that the reader knows, by name.

    Raises:
        ValueError: The class isn't in `table`.
    """
    kinds = [kind for kind, known in table.items() if known is type(record)]
    if not kinds:
        raise ValueError(f"{type(record).__name__} is not in the table; known: {', '.join(table)}")
    packed = {f.name for f in _fields(type(record)) if f.metadata.get("symmetric")}
    tensors = {n: pack_triangle(t) if n in packed else t.contiguous() for n, t in tensor_fields(record).items()}
    return PackedRecord(kind=kinds[0], tensors=tensors, static=static_fields(record))


def unpack(packed: PackedRecord, table: Mapping[str, type]) -> Any:
    """Puts a record together again; its tensors are fresh allocations, so their alignment is always the same.

    Args:
        packed: What `pack` returned, perhaps after a journey.
        table: The classes by name.

    Raises:
        ValueError: Unknown kind, or fields that are missing, left over or of the wrong type.
    """
    if packed.kind not in table:
        raise ValueError(f"unknown record {packed.kind!r}; known: {', '.join(table)}")
    cls = table[packed.kind]
    values: dict[str, Any] = {}
    for f in _fields(cls):
        if _is_tensor(cls, f) and f.name in packed.tensors:
            tensor = packed.tensors[f.name]
            values[f.name] = unpack_triangle(tensor) if f.metadata.get("symmetric") else tensor.clone()
        elif not _is_tensor(cls, f) and f.name in packed.static:
            values[f.name] = packed.static[f.name]
        else:
            raise ValueError(f"{packed.kind} lacks its field {f.name!r}")
    left_over = (packed.tensors.keys() | packed.static.keys()) - values.keys()
    if left_over:
        raise ValueError(f"{packed.kind} has no fields {', '.join(sorted(left_over))}")
    return cls(**values)


def _fields(cls: type) -> tuple[Field[Any], ...]:
    if not is_dataclass(cls):
        raise ValueError(f"{cls.__name__} is not a dataclass")
    return fields(cls)


def _is_tensor(cls: type, f: Field[Any]) -> bool:
    return (f.type if not isinstance(f.type, str) else get_type_hints(cls)[f.name]) is Tensor
