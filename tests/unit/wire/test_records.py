"""Records within records: moved, packed and put together like flat ones, under dotted names."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kfdist.wire import records
from tests.support.matrices import gaussian


@dataclass(frozen=True)
class Base:
    rows: Tensor


@dataclass(frozen=True)
class Leaf(Base):
    matrix: Tensor = records.symmetric_field()
    label: str = "leaf"


@dataclass(frozen=True)
class Middle(Base):
    inner: Base
    kind: str = "a field of this name is no trouble"


@dataclass(frozen=True)
class Outer:
    weight: Tensor
    inner: Middle
    number: int = 3


TABLE = {"leaf": Leaf, "middle": Middle, "outer": Outer, "base": Base}


def make() -> Outer:
    matrix = gaussian(2, 4, 4, seed=1)
    leaf = Leaf(gaussian(2, 3, seed=2), matrix + matrix.mT)
    return Outer(gaussian(5, seed=3), Middle(gaussian(3, 2, seed=4).mT, leaf))


def test_the_walk_goes_inside_under_dotted_names() -> None:
    made = make()
    assert list(records.tensor_fields(made)) == ["weight", "inner.rows", "inner.inner.rows", "inner.inner.matrix"]
    assert records.static_fields(made) == {
        "inner.inner.label": "leaf",
        "inner.kind": "a field of this name is no trouble",
        "number": 3,
    }
    assert records.symmetric_fields(made) == {"inner.inner.matrix"}


def test_a_nested_record_comes_back_whole() -> None:
    made = make()
    packed = records.pack(made, TABLE)
    assert packed.kind == "outer"
    assert packed.tensors["inner.inner.matrix"].shape == (2, 10)
    assert (packed.static["inner"], packed.static["inner.inner"]) == ("middle", "leaf")
    back = records.unpack(packed, TABLE)
    assert type(back.inner) is Middle and type(back.inner.inner) is Leaf
    assert records.static_fields(back) == records.static_fields(made)
    expected, found = records.tensor_fields(made), records.tensor_fields(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_moving_and_packing_tight_reach_the_inner_tensors() -> None:
    made = make()
    assert records.move(made, "cpu") is made
    moved = records.move(made, "cpu", torch.float32)
    assert {tensor.dtype for tensor in records.tensor_fields(moved).values()} == {torch.float32}
    assert not made.inner.rows.is_contiguous() and records.contiguous(made).inner.rows.is_contiguous()
    doubled = records.with_tensors(made, {name: 2 * each for name, each in records.tensor_fields(made).items()})
    assert torch.equal(records.tensor_fields(doubled)["inner.inner.rows"], 2 * made.inner.inner.rows)
    assert records.static_fields(doubled) == records.static_fields(made)


def _static(**changes: object) -> dict[str, object]:
    packed = records.pack(make(), TABLE)
    return {**packed.static, **{name.replace("_", "."): value for name, value in changes.items()}}


@pytest.mark.parametrize(
    ("static", "message"),
    [
        (_static(inner="other"), "unknown record 'other'; known: leaf, middle, outer"),
        (_static(inner_inner="base"), "base has no fields label, matrix"),
        ({k: v for k, v in _static().items() if k != "inner.inner"}, "middle lacks its field 'inner'"),
        (_static(inner_more=1), "middle has no fields more"),
        (_static(innermore=1), "outer has no fields innermore"),
    ],
)
def test_a_nested_record_that_does_not_fit_is_refused(static: dict[str, object], message: str) -> None:
    packed = records.pack(make(), TABLE)
    with pytest.raises(ValueError, match=message):
        records.unpack(replace(packed, static=static), TABLE)  # type: ignore[arg-type]


def test_a_record_of_the_wrong_class_inside_is_refused() -> None:
    leaf = records.pack(make().inner.inner, TABLE)
    packed = records.PackedRecord(
        kind="outer",
        tensors={"weight": torch.ones(1), **{f"inner.{name}": each for name, each in leaf.tensors.items()}},
        static={"number": 1, "inner": "leaf", **{f"inner.{name}": each for name, each in leaf.static.items()}},
    )
    with pytest.raises(ValueError, match="outer can't hold a leaf as 'inner'"):
        records.unpack(packed, TABLE)


def test_an_unknown_class_inside_does_not_travel() -> None:
    with pytest.raises(ValueError, match="Leaf is not in the table; known: outer, middle"):
        records.pack(make(), {"outer": Outer, "middle": Middle})
