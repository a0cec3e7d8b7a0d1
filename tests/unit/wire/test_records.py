"""Records within records: walked, moved, taken apart and put together like flat ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

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
    word: Literal["one", "other"] = "other"


TABLE = {"leaf": Leaf, "middle": Middle, "outer": Outer, "base": Base}


def make() -> Outer:
    matrix = gaussian(2, 4, 4, seed=1)
    leaf = Leaf(gaussian(2, 3, seed=2), matrix + matrix.mT)
    return Outer(gaussian(5, seed=3), Middle(gaussian(3, 2, seed=4).mT, leaf))


def test_the_walk_goes_inside_under_dotted_names() -> None:
    made = make()
    assert list(records.tensor_fields(made)) == ["weight", "inner.rows", "inner.inner.rows", "inner.inner.matrix"]
    assert records.symmetric_fields(made) == {"inner.inner.matrix"}


def test_a_nested_record_comes_back_whole() -> None:
    made = make()
    tree = records.to_tree(made, TABLE)
    middle = tree["fields"]["inner"]
    leaf = middle["fields"]["inner"]
    assert (tree["kind"], middle["kind"], leaf["kind"]) == ("outer", "middle", "leaf")
    assert (tree["fields"]["number"], leaf["fields"]["label"]) == (3, "leaf")
    assert middle["fields"]["kind"] == "a field of this name is no trouble"
    assert leaf["fields"]["matrix"].shape == (2, 10)
    back = records.from_tree(tree, TABLE)
    assert type(back.inner) is Middle and type(back.inner.inner) is Leaf
    assert (back.number, back.inner.kind, back.inner.inner.label) == (3, made.inner.kind, "leaf")
    expected, found = records.tensor_fields(made), records.tensor_fields(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_mapping_and_moving_reach_the_inner_tensors() -> None:
    made = make()
    assert records.move(made, "cpu") is made
    moved = records.move(made, "cpu", torch.float32)
    assert {tensor.dtype for tensor in records.tensor_fields(moved).values()} == {torch.float32}
    assert not made.inner.rows.is_contiguous() and records.contiguous(made).inner.rows.is_contiguous()
    tripled = records.map_tensors(lambda one, other: one + other, made, records.map_tensors(lambda t: 2 * t, made))
    assert torch.equal(records.tensor_fields(tripled)["inner.inner.rows"], 3 * made.inner.inner.rows)
    assert (tripled.number, tripled.inner.kind) == (made.number, made.inner.kind)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda middle: middle["fields"].pop(name)


def with_inner(value: object) -> Callable[[dict[str, Any]], object]:
    return lambda middle: middle["fields"].update(inner=value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda middle: middle.update(kind="other"), "unknown record 'other'; known: leaf, middle, outer"),
        (lambda middle: middle.update(kind="base"), "base has no fields inner, kind"),
        (without("inner"), "middle lacks its field 'inner'"),
        (without("rows"), "middle lacks its field 'rows'"),
        (with_inner(None), "None is no record"),
        (with_inner(torch.ones(2)), "a tensor of shape .2,. is no record"),
        (lambda middle: middle["fields"].update(more=1), "middle has no fields more"),
    ],
)
def test_a_nested_record_that_does_not_fit_is_refused(edit: Callable[[dict[str, Any]], object], message: str) -> None:
    tree = records.to_tree(make(), TABLE)
    edit(tree["fields"]["inner"])
    with pytest.raises(ValueError, match=message):
        records.from_tree(tree, TABLE)


def test_a_record_of_the_wrong_class_inside_is_refused() -> None:
    leaf = records.to_tree(make().inner.inner, TABLE)
    tree = records.make_tree("outer", {"weight": torch.ones(1), "number": 1, "inner": leaf, "word": "one"})
    with pytest.raises(ValueError, match="outer can't hold a leaf as 'inner'"):
        records.from_tree(tree, TABLE)


def test_an_unknown_class_inside_does_not_travel() -> None:
    with pytest.raises(ValueError, match="Leaf is not in the table; known: outer, middle"):
        records.to_tree(make(), {"outer": Outer, "middle": Middle})


@pytest.mark.parametrize("word", ["third", 1, ["one"], torch.ones(1)])
def test_a_word_that_the_class_does_not_know_is_refused(word: Any) -> None:
    tree = records.to_tree(make(), TABLE)
    tree["fields"]["word"] = word
    with pytest.raises(ValueError, match="word"):
        records.from_tree(tree, TABLE)


def leaf(value: object) -> Any:
    fields = {"rows": torch.ones(1), "matrix": value}
    return records.from_tree({"kind": "leaf", "fields": fields}, {"leaf": Leaf})


def test_symmetric_matrices_come_as_rows_where_they_are_few() -> None:
    rows = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(leaf({"rows": rows}).matrix, rows.mT @ rows)
    rows[..., 5:] = 0.0
    found = leaf({"rows": rows}).matrix
    torch.testing.assert_close(found, rows.mT @ rows)
    assert torch.equal(found, found.mT) and found.is_contiguous()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "rows alone"),
        ({"rows": 3}, "rows alone"),
        ({"rows": torch.ones(2, 2), "more": 1}, "rows alone"),
        ({"rows": torch.ones(2, 2, dtype=torch.int64)}, "rows alone"),
        ({"rows": torch.ones(1, 2, 513)}, "2 rows of 513 numbers"),
        ({"rows": torch.ones(1, 0, 5)}, "0 rows of 5 numbers"),
        ({"rows": torch.ones(1, 2, 15)}, "2 rows of 15 numbers"),
        ({"rows": torch.ones(1, 2, 16, dtype=torch.bfloat16)}, "rows alone, of float32 or float64"),
        ({"rows": torch.ones(1, 2, 16, dtype=torch.float16)}, "rows alone, of float32 or float64"),
        ({"rows": torch.ones(1, 65, 16640)}, "65 rows of 16640 numbers for 1 matrices"),
        ({"rows": torch.ones(4097, 1, 256)}, "for 4097 matrices"),
    ],
)
def test_rows_that_are_none_or_would_take_any_memory_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leaf(value)
    assert records.can_travel_as_rows(2, 512) and not records.can_travel_as_rows(2, 513)
    assert not records.can_travel_as_rows(3, 23) and not records.can_travel_as_rows(0, 0)
    assert records.can_travel_as_rows(1, 256, 4096) and not records.can_travel_as_rows(1, 256, 4097)
