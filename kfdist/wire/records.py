"""Frozen dataclasses of tensors as plain data: one walk over the fields serves wire, checkpoint, digest and devices.

A record's fields are tensors, static values that JSON can hold (numbers, strings, booleans), or records themselves. A
tensor field whose metadata says `symmetric` holds symmetric matrices and travels as packed triangles. The fields of an
inner record have dotted names: `inner.w_A`. It travels with the name of its kind as the static value `inner`, looked up
in the same table as the record around it.
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
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class PackedRecord:
    """A record ready to travel.

    Attributes:
        kind: Name of its class in the table that the reader uses.
        tensors: Tensor fields by name, symmetric ones packed.
        static: Static fields by name, and the kinds of inner records.
    """

    kind: str
    tensors: dict[str, Tensor]
    static: dict[str, Static]


def symmetric_field() -> Any:
    """Declares a tensor field of symmetric matrices `[..., d, d]`."""
    return field(metadata={"symmetric": True})


def tensor_fields(record: object) -> dict[str, Tensor]:
    """Returns the tensor fields of a record by name, those of inner records too, in the order of their declaration."""
    found: dict[str, Tensor] = {}
    for f in _fields(type(record)):
        value = getattr(record, f.name)
        if _is_tensor(type(record), f):
            found[f.name] = value
        elif _is_record(type(record), f):
            found |= _under(f.name, tensor_fields(value))
    return found


def static_fields(record: object) -> dict[str, Static]:
    """Returns the static fields of a record by name, those of inner records too, in the order of their declaration."""
    found: dict[str, Static] = {}
    for f in _fields(type(record)):
        value = getattr(record, f.name)
        if _is_record(type(record), f):
            found |= _under(f.name, static_fields(value))
        elif not _is_tensor(type(record), f):
            found[f.name] = value
    return found


def symmetric_fields(record: object) -> frozenset[str]:
    """Returns the names of the fields that hold symmetric matrices, those of inner records too."""
    own = {f.name for f in _fields(type(record)) if f.metadata.get("symmetric")}
    inner = (f.name for f in _fields(type(record)) if _is_record(type(record), f))
    return frozenset(own.union(*(_under(n, dict.fromkeys(symmetric_fields(getattr(record, n)))) for n in inner)))


def with_tensors(record: RecordType, tensors: Mapping[str, Tensor]) -> RecordType:
    """Returns the record with other tensors.

    Args:
        record: Any record.
        tensors: All its tensor fields, by the names that `tensor_fields` gives them.
    """
    changed: dict[str, Any] = {}
    for f in _fields(type(record)):
        if _is_tensor(type(record), f):
            changed[f.name] = tensors[f.name]
        elif _is_record(type(record), f):
            changed[f.name] = with_tensors(getattr(record, f.name), _inside(f.name, tensors))
    return replace(record, **changed)


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
    return with_tensors(record, after)


def contiguous(record: RecordType) -> RecordType:
    """Returns the record with row-major tensors, as they arrive from a journey.

    Matrix products take another path for another memory layout and differ in their last bits.
    """
    return with_tensors(record, {name: tensor.contiguous() for name, tensor in tensor_fields(record).items()})


def pack(record: object, table: Mapping[str, type]) -> PackedRecord:
    """Takes a record apart.

    Args:
        record: An instance of a class in `table`.
        table: The classes that the reader knows, by name; those of inner records too.

    Raises:
        ValueError: The class isn't in `table`.
    """
    packed = symmetric_fields(record)
    tensors = {n: pack_triangle(t) if n in packed else t.contiguous() for n, t in tensor_fields(record).items()}
    return PackedRecord(
        kind=_kind(record, table), tensors=tensors, static={**static_fields(record), **_kinds(record, table)}
    )


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
    read: set[str] = set()
    for f in _fields(cls):
        if _is_record(cls, f) and f.name in packed.static:
            inner = PackedRecord(
                kind=str(packed.static[f.name]),
                tensors=_inside(f.name, packed.tensors),
                static=_inside(f.name, packed.static),
            )
            values[f.name] = unpack(inner, table)
            if not isinstance(values[f.name], _hint(cls, f)):
                raise ValueError(f"{packed.kind} can't hold a {inner.kind} as {f.name!r}")
            read |= {f.name, *_under(f.name, inner.tensors), *_under(f.name, inner.static)}
            continue
        if _is_tensor(cls, f) and f.name in packed.tensors:
            tensor = packed.tensors[f.name]
            values[f.name] = unpack_triangle(tensor) if f.metadata.get("symmetric") else tensor.clone()
        elif not (_is_tensor(cls, f) or _is_record(cls, f)) and f.name in packed.static:
            values[f.name] = packed.static[f.name]
        else:
            raise ValueError(f"{packed.kind} lacks its field {f.name!r}")
        read.add(f.name)
    left_over = (packed.tensors.keys() | packed.static.keys()) - read
    if left_over:
        raise ValueError(f"{packed.kind} has no fields {', '.join(sorted(left_over))}")
    return cls(**values)


def _kind(record: object, table: Mapping[str, type]) -> str:
    for kind, known in table.items():
        if known is type(record):
            return kind
    raise ValueError(f"{type(record).__name__} is not in the table; known: {', '.join(table)}")


def _kinds(record: object, table: Mapping[str, type]) -> dict[str, Static]:
    """Returns the kinds of a record's inner records, and of theirs."""
    found: dict[str, Static] = {}
    for f in _fields(type(record)):
        if _is_record(type(record), f):
            inner = getattr(record, f.name)
            found |= {f.name: _kind(inner, table), **_under(f.name, _kinds(inner, table))}
    return found


def _under(name: str, inner: Mapping[str, V]) -> dict[str, V]:
    return {f"{name}.{key}": value for key, value in inner.items()}


def _inside(name: str, outer: Mapping[str, V]) -> dict[str, V]:
    return {key.removeprefix(f"{name}."): value for key, value in outer.items() if key.startswith(f"{name}.")}


def _fields(cls: type) -> tuple[Field[Any], ...]:
    if not is_dataclass(cls):
        raise ValueError(f"{cls.__name__} is not a dataclass")
    return fields(cls)


def _hint(cls: type, f: Field[Any]) -> Any:
    return f.type if not isinstance(f.type, str) else get_type_hints(cls)[f.name]


def _is_tensor(cls: type, f: Field[Any]) -> bool:
    return _hint(cls, f) is Tensor


def _is_record(cls: type, f: Field[Any]) -> bool:
    return is_dataclass(_hint(cls, f))
