"""What inversions say of themselves reaches the controller, `coverage()` and the totals."""

import pytest
import torch
from torch import nn

import kfdist
from kfdist.control.exporter import Exporter
from kfdist.control.series import Sender
from kfdist.curvature.inverter import Inversion, Outcome
from kfdist.runtime.telemetry_samples import CLOSED_FORMS, diagnostic_note, diagnostic_samples
from kfdist.telemetry.metrics import METRICS, Across, fault_in
from kfdist.types import MetricSample
from tests.support.cases import CASES, InverterCase
from tests.support.preconditioning import backward, gradients, preconditioner, rows, two_layers

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
    errors = {"rank_A": 220.0, "direction_error": 0.51, "mean_direction_error": 0.042}
    limited = Inversion(preconditioner=None, outcome=Outcome.DONE, diagnostics=errors | {"limited_by_rank": 1.0})
    assert diagnostic_note(9, limited) == (
        "version 9 (done): rank 220, limited by rank: direction error up to 0.51, mean 0.042"
    )
    enough = Inversion(preconditioner=None, outcome=Outcome.DONE, diagnostics=errors | {"limited_by_rank": 0.0})
    assert diagnostic_note(9, enough) == "version 9 (done): rank 220"
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


def told(pre: kfdist.Preconditioner) -> dict[tuple[str, ...], float]:
    return {(each.name, *each.labels.values()): each.value for each in pre.samples()}


def test_the_factor_of_the_kl_clip_is_what_all_directions_were_multiplied_by():
    plain, clipped = two_layers(), two_layers()
    with preconditioner(plain, kl_clip=None) as pre:
        backward(plain)
        pre.step()
        assert ("kfdist_kl_clip_factor",) not in told(pre)
    with preconditioner(clipped, kl_clip=1e-6) as pre:
        backward(clipped)
        pre.step()
        factor = told(pre)["kfdist_kl_clip_factor",]
    assert 0 < factor < 1
    for mine, theirs in zip(gradients(clipped), gradients(plain), strict=True):
        assert torch.allclose(mine, factor * theirs, rtol=1e-6)


def test_an_adaptive_step_tells_its_own_damping_and_its_trust_ratio():
    model = two_layers()
    x, y = rows()
    with preconditioner(model, kfdist.KfacEigen(damping_rule="pi"), kl_clip=None, lr=None, damping=9.0) as pre:
        assert told(pre)["kfdist_damping",] == 9.0 and ("kfdist_trust_ratio",) not in told(pre)
        stepper = kfdist.AdaptiveStep(pre, loss="cross_entropy", damping=3.0)
        report = stepper.step(lambda: ((output := model(x)), nn.functional.cross_entropy(output, y)))
        found = told(pre)
        assert found["kfdist_damping",] == 3.0
        assert found["kfdist_trust_ratio",] == report.rho


def test_staleness_and_delay_of_a_lag():
    model = two_layers()
    with preconditioner(model, adoption=kfdist.FixedLag(2), inverse_period=4) as pre:
        seen = []
        for step in range(8):
            backward(model, seed=step)
            pre.step()
            found = told(pre)
            seen.append([found[f"kfdist_{name}_steps", "0"] for name in ("staleness", "delay")])
            assert found["kfdist_inverse_period_steps",] == 4 and found["kfdist_lag_steps",] == 2
    # Version 0 is waited for at step 0, version 4 adopted at step 6.
    assert seen == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [2, 2], [3, 2]]


def test_a_method_with_a_period_of_its_own_is_judged_by_that():
    model = two_layers()
    table = {"0": kfdist.EkfacAdam(basis_period=4), "*": "rs-kfac"}
    with preconditioner(model, table, factor_period=2, inverse_period=12, kl_clip=None) as pre:
        backward(model)
        pre.step()
        found = told(pre)
        names = {labels[0] for name, *labels in found if name == "kfdist_update_period_steps"}
        assert {found["kfdist_update_period_steps", name] for name in names - {"0"}} == {12}
        assert found["kfdist_lag_steps",] == 0
        assert found["kfdist_update_period_steps", "0"] == 4 and found["kfdist_inverse_period_steps",] == 12


def test_waits_for_results_are_told_once():
    model = two_layers()
    with preconditioner(model) as pre:
        backward(model)
        waited = pre.step().waited_seconds
        assert [each.value for each in pre.samples() if each.name == "kfdist_adoption_wait_seconds"] == [waited]
        assert not [each for each in pre.samples() if each.name == "kfdist_adoption_wait_seconds"]


@pytest.mark.parametrize(("blocks", "norms"), [(54, 0), (54, 53)])
def test_256_ranks_stay_under_2000_series(blocks: int, norms: int):
    layers = [nn.Sequential(nn.Linear(4, 4), *([nn.LayerNorm(4)] if i < norms else [])) for i in range(blocks)]
    model = nn.Sequential(*layers).double()
    with preconditioner(model, "rs-kfac") as pre:
        model(torch.ones(2, 4, dtype=torch.float64)).square().mean().backward()
        pre.step()
        told = pre.samples()
    # The trainer's two phases, and one of everything that this run had no reason to tell.
    told += [MetricSample(name="kfdist_step_seconds", value=1.0, labels={"phase": each}) for each in ("input", "total")]
    for name in METRICS.keys() - {each.name for each in told}:
        if METRICS[name].sent:
            told.append(MetricSample(name=name, value=1.0, labels=dict.fromkeys(METRICS[name].labels, "some")))
    of_others = [each for each in told if METRICS[each.name].across is not Across.RANK_ZERO]
    exporter = Exporter()
    for rank in range(256):
        exporter.ingest("large", Sender("worker", str(rank)), "1", of_others if rank else told)
    series = [sample for family in exporter.collect() for sample in family.samples]
    named = {sample.labels["block"] for sample in series if sample.name == "kfdist_delay_steps"}
    assert len(named) == blocks + bool(norms)
    assert (CLOSED_FORMS in named) == bool(norms)
    assert 10 * blocks < len(series) < 2000
