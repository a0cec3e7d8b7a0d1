"""Preconditioners and records as data: moving, casting, shapes, the walk over fields."""

import inspect
from dataclasses import dataclass, fields, replace
from typing import Literal, get_origin

import pytest
import torch
from torch import Tensor

from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerSpectrum
from kfdist.curvature.inverters import PRECONDITIONERS, make_inverter
from kfdist.wire import records
from tests.support.inversions import invert_with_ladder
from tests.support.matrices import gaussian, make_factors, relative_error

DAMPING = 1e-2
V = gaussian(2, 7, 12, seed=3)


def make(method: str, dtype: torch.dtype = torch.float64, **settings: object) -> AbstractPreconditioner:
    inverter, factors = make_inverter(method, **settings), make_factors("decaying", dtype)
    made = invert_with_ladder(inverter, factors, damping=DAMPING, previous={}, seed=0).preconditioner
    assert made is not None
    return made


both_kinds = pytest.mark.parametrize("method", ["kfac", "kfac-eigen"])


def test_every_kind_is_in_the_table() -> None:
    def below(cls: type) -> set[type]:
        return {cls}.union(*(below(each) for each in cls.__subclasses__()))

    kinds = {cls for cls in below(AbstractPreconditioner) if cls.__module__.startswith("kfdist.")}
    assert {cls for cls in kinds if not inspect.isabstract(cls)} == set(PRECONDITIONERS.values())


@both_kinds
def test_a_gradient_of_another_shape_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"has shape \(1, 7, 12\), the preconditioner is for \(2, 7, 12\)"):
        make(method).apply(V[:1], DAMPING)


@both_kinds
def test_the_gradients_dtype_is_kept_and_autocast_is_ignored(method: str) -> None:
    made = make(method, torch.float32)
    expected = made.apply(V.float(), DAMPING)
    assert made.apply(V.bfloat16(), DAMPING).dtype == torch.bfloat16
    assert made.apply(V, DAMPING).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(made.apply(V.float(), DAMPING), expected)


@both_kinds
def test_what_is_prepared_stays_until_the_damping_changes_and_is_remade_bit_for_bit(method: str) -> None:
    made, memory = make(method), BlockMemory()
    once = made.apply(V, DAMPING, memory)
    prepared = memory.prepared
    assert torch.equal(made.apply(V, DAMPING, memory), once)
    assert memory.prepared is prepared
    assert not memory.state_dict()
    raised = made.apply(V, 2 * DAMPING, memory)
    assert torch.equal(raised, made.apply(V, 2 * DAMPING))
    assert torch.equal(made.apply(V, DAMPING, memory), once)


def test_what_is_prepared_of_one_snapshot_is_not_used_for_the_next() -> None:
    memory, first, second = BlockMemory(), make("kfac-eigen"), make("kfac-eigen")
    second = replace(second, trace_A=2 * second.trace_A)
    first.apply(V, DAMPING, memory)
    second.apply(V, DAMPING, memory)
    assert memory.prepared is not None
    assert memory.prepared.inverse is second


@both_kinds
def test_moving_is_casting_every_tensor_or_nothing(method: str) -> None:
    made = make(method)
    assert made.to("cpu") is made
    moved = made.to("cpu", torch.float32)
    assert {t.dtype for t in records.tensor_fields(moved).values()} == {torch.float32}
    statics = [f.name for f in fields(made) if f.type is not Tensor]
    assert [getattr(moved, name) for name in statics] == [getattr(made, name) for name in statics]
    assert relative_error(moved.apply(V.float(), DAMPING), made.apply(V, DAMPING)) < 1e-4  # float32


@both_kinds
def test_they_are_frozen(method: str) -> None:
    with pytest.raises(AttributeError):
        make(method).trace_A = torch.zeros(2)  # type: ignore[misc]


def test_damping_fixed_at_the_inversion_stays() -> None:
    fixed, free = make("kfac"), make("kfac-eigen")
    assert not fixed.damping_at_apply and free.damping_at_apply
    assert torch.equal(fixed.apply(V, 1.0), fixed.apply(V, DAMPING))
    torch.testing.assert_close(fixed.fallback(V, 1.0), fixed.fallback(V, DAMPING))
    assert relative_error(free.apply(V, 1.0), free.apply(V, DAMPING)) > 0.1


def test_fallback_keeps_the_size_of_the_step() -> None:
    """On a flat spectrum the fallback is the exact direction; the bare gradient is 1/(lambda + tau) off."""
    flat = make("kfac-eigen")
    assert isinstance(flat, KroneckerSpectrum)
    flat = replace(
        flat,
        w_A=torch.full_like(flat.w_A, 3.0),
        w_G=torch.full_like(flat.w_G, 2.0),
        trace_A=torch.full_like(flat.trace_A, 36.0),
        trace_G=torch.full_like(flat.trace_G, 14.0),
    )
    assert relative_error(flat.fallback(V, DAMPING), flat.apply(V, DAMPING)) < 1e-12
    assert relative_error(flat.fallback(V, DAMPING), V / (6 + DAMPING)) < 1e-12


@dataclass(frozen=True)
class Example:
    matrix: Tensor = records.symmetric_field()
    rows: Tensor = torch.zeros(0)
    label: str = ""
    number: float = 0.0


TABLE = {"example": Example}
FIELDS = records.to_tree(Example(torch.eye(3), torch.zeros(1)), TABLE)["fields"]


def test_a_record_comes_back_whole_and_symmetric_fields_travel_as_triangles() -> None:
    matrix = gaussian(2, 5, 5, seed=1)
    record = Example(matrix + matrix.mT, gaussian(2, 3, seed=2).mT, "a label", 0.1)
    tree = records.to_tree(record, TABLE)
    assert tree.keys() == {"kind", "fields"} and tree["kind"] == "example"
    assert tree["fields"]["matrix"].shape == (2, 15)
    assert (tree["fields"]["label"], tree["fields"]["number"]) == ("a label", 0.1)
    back = records.from_tree(tree, TABLE)
    assert torch.equal(back.matrix, record.matrix) and torch.equal(back.rows, record.rows)
    assert (back.label, back.number) == (record.label, record.number)
    assert back.rows.data_ptr() != tree["fields"]["rows"].data_ptr()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (None, "None is no record; it must have a kind and fields"),
        ({"kind": "example"}, "is no record"),
        ({"kind": "example", "fields": [1]}, "is no record"),
        ({"kind": "example", "fields": {}, "more": 1}, "is no record"),
        ({"kind": "other", "fields": FIELDS}, "unknown record 'other'; known: example"),
        ({"kind": "example", "fields": {}}, "example lacks its field 'matrix'"),
        ({"kind": "example", "fields": {**FIELDS, "more": 2}}, "example has no fields more"),
        ({"kind": "example", "fields": {**FIELDS, "rows": 2}}, "field 'rows' of example is 2; it must be a tensor"),
        (
            {"kind": "example", "fields": {**FIELDS, "label": torch.ones(3)}},
            "is a tensor of shape .3,.; it must be a n",
        ),
        ({"kind": "example", "fields": {**FIELDS, "label": None}}, "field 'label' of example is None; it must be a nu"),
        ({"kind": "example", "fields": {**FIELDS, "label": [1]}}, "field 'label' of example is .1.; it must be a num"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tree: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        records.from_tree(tree, TABLE)


def test_a_record_from_before_a_field_with_a_default_comes_back() -> None:
    older = {name: value for name, value in FIELDS.items() if name != "number"}
    assert records.from_tree({"kind": "example", "fields": older}, TABLE).number == 0.0


def test_an_unknown_class_does_not_travel() -> None:
    with pytest.raises(ValueError, match="Example is not in the table; known: kronecker-inverse"):
        records.to_tree(Example(torch.eye(3)), PRECONDITIONERS)


@pytest.mark.parametrize("cls", PRECONDITIONERS.values())
def test_preconditioners_hold_nothing_but_tensors_and_json(cls: type[AbstractPreconditioner]) -> None:
    types = {f.type for f in fields(cls)} - {Tensor, float, int, str, bool, *PRECONDITIONERS.values()}
    assert all(get_origin(each) is Literal for each in types)


def test_a_memory_counts_without_looking_and_is_its_own_copy() -> None:
    memory = BlockMemory({"scales": torch.ones(2)})
    for happened in (True, False, True):
        memory.count("uphill", torch.tensor(happened))
    copy = memory.copy()
    copy.count("uphill", torch.tensor(True))
    copy.kept["more"] = torch.zeros(1)
    assert (int(memory.counts["uphill"]), int(copy.counts["uphill"])) == (2, 3)
    assert set(memory.kept) == {"scales"}


def test_a_memory_goes_on_from_its_state() -> None:
    memory = BlockMemory({"scales": torch.ones(2)}, measured=torch.tensor(True))
    memory.count("uphill", torch.tensor(True))
    state = memory.state_dict()
    memory.kept["scales"].zero_()
    back = BlockMemory.of_state(state, torch.device("cpu"))
    assert back.measured is not None and bool(back.measured)
    assert (back.kept["scales"].tolist(), int(back.counts["uphill"])) == ([1.0, 1.0], 1)
    assert BlockMemory().state_dict() == {}


@both_kinds
def test_spectra_are_the_factors_eigenvalues(method: str) -> None:
    factors = make_factors("decaying", torch.float64)
    spectra = make(method).spectra(BlockMemory())
    for name, truth in (("A", factors.A), ("G", factors.G)):
        values, size = spectra[name]
        assert size == truth.shape[0] * truth.shape[-1]
        found, expected = (each.flatten().sort().values for each in (values, torch.linalg.eigvalsh(truth)))
        assert relative_error(found, expected) < 1e-9


def test_spectra_of_large_dense_inverses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfdist.curvature.inverse._CHEAP_DIMENSION", 8)
    assert set(make("kfac").spectra(BlockMemory())) == {"G"}
