"""What inversions say of themselves reaches the controller, `coverage()` and the totals."""

import pytest
import torch

from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.runtime.telemetry_samples import diagnostic_note, diagnostic_samples
from kfdist.telemetry.metrics import fault_in
from kfdist.types import MetricSample
from tests.support.cases import CASES, InverterCase
from tests.support.preconditioning import backward, preconditioner, two_layers

FOUND = {
    "rank_A": 17.0,
    "rank_G": 10.0,
    "residual_A": 3.25e-7,
    "residual_G": 1e-8,
    "smallest_eigenvalue_A": 0.5,
    "smallest_eigenvalue_coarse": -0.25,
    "repairs_A": 0.0,
    "damping": 0.1,
    "rung": 1.0,
}
WITHOUT_GAUGE = {"largest_correlation"}


def test_every_factor_has_its_gauge_and_the_block_its_rung():
    def gauge(name: str, value: float, **labels: str) -> MetricSample:
        return MetricSample(name=f"kfdist_inversion_{name}", value=value, labels={"block": "fc", **labels})

    assert diagnostic_samples("fc", FOUND) == [
        gauge("rank", 17.0, factor="A"),
        gauge("rank", 10.0, factor="G"),
        gauge("residual", 3.25e-7, factor="A"),
        gauge("residual", 1e-8, factor="G"),
        gauge("smallest_eigenvalue", 0.5, factor="A"),
        gauge("smallest_eigenvalue", -0.25, factor="coarse"),
        gauge("rung", 1.0),
    ]
    assert diagnostic_samples("fc", {}) == []


def test_the_note_has_all_ranks_and_the_worst_of_the_rest():
    outcome = Inversion(preconditioner=None, outcome=Outcome.FLOAT64, diagnostics=FOUND)
    assert diagnostic_note(40, outcome) == (
        "version 40 (float64): rank 17/10, residual 3.25e-07, smallest eigenvalue -0.25"
    )
    assert diagnostic_note(7, Inversion(preconditioner=None, outcome=Outcome.DONE)) == "version 7 (done)"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_methods_say_has_a_gauge_that_takes_it(case: InverterCase):
    quantities = {name.rpartition("_")[0] for name in case.diagnostics}
    samples = diagnostic_samples("fc", dict.fromkeys(case.diagnostics, 0.5))
    told = {sample.name for sample in samples}
    assert len(told) == len(quantities - WITHOUT_GAUGE)
    assert [fault_in(sample) for sample in samples] == [""] * len(samples)


def test_a_preconditioner_tells_of_the_inversions_in_use():
    model = two_layers()
    with preconditioner(model, "kfac-eigen") as pre:
        before = pre.coverage()
        assert {row.inversion for row in before.rows} == {""}
        backward(model)
        pre.step()
        coverage = pre.coverage()
        assert coverage == before  # a moment's note is no part of what is covered
        assert all(row.inversion.startswith("version 0 (done): rank ") for row in coverage.rows), str(coverage)
        assert "orthogonality error" in str(coverage)
        samples = {(each.name, each.labels.get("block"), each.labels.get("factor")): each for each in pre.samples()}
        for name, block in model.named_children():
            if isinstance(block, torch.nn.Linear):
                assert samples["kfdist_inversion_rank", name, "G"].value == block.out_features
                assert samples["kfdist_inversion_residual", name, "A"].value < 1e-8
                assert samples["kfdist_inversion_rung", name, None].value == 0
        assert all(fault_in(sample) == "" for sample in samples.values())


def test_ranks_that_invert_for_themselves_have_nothing_to_tell():
    model = two_layers()
    with preconditioner(model, "eva") as pre:
        backward(model)
        pre.step()
        assert {row.inversion for row in pre.coverage().rows} == {""}
        assert not any(sample.name.startswith("kfdist_inversion_r") for sample in pre.samples())
