"""Models without weights and examples without data: as configured, as given, and as far as they can be known."""

from pathlib import Path

import pytest
import torch

from kfdist.config import Config, load_config
from kfdist.forecast.outline import Given, make_outline
from kfdist.forecast.rehearsal import rehearse
from kfdist.training.method import plan_of

MODELS = "tests.support.outlined_models"


def _config(*overrides: str) -> Config:
    return load_config(None, environment={}, overrides=overrides)


def test_the_bundled_digits_are_neither_made_nor_read() -> None:
    outline = make_outline(_config(), Given())
    assert {parameter.device.type for parameter in outline.model.parameters()} == {"meta"}
    assert (outline.example.shape, outline.example.classes, outline.remarks) == ((1, 8, 8), 10, ())


def test_classes_that_nobody_knows_are_assumed_aloud(tmp_path: Path) -> None:
    images = ['data.name="image-folder"', f'data.settings={{ root = "{tmp_path}", train_size = 16 }}']
    config = _config(*images, 'model.name="mlp"')
    assumed = make_outline(config, Given())
    assert assumed.example.classes == 1000 and assumed.example.shape == (3, 16, 16)
    assert "1000 classes are assumed" in assumed.remarks[0]
    given = make_outline(config, Given(classes=7))
    assert (given.example.classes, given.remarks) == (7, ())
    for name in ("a", "b", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
    found = make_outline(config, Given())
    assert (found.example.classes, found.remarks) == (3, ())


def test_data_of_ones_own_are_looked_at_or_described() -> None:
    config = _config(f'data.name="{MODELS}:tokens"', f'model.name="{MODELS}:tagger"')
    seen = make_outline(config, Given())
    assert (seen.example.shape, seen.example.dtype, seen.example.classes) == ((12,), torch.int64, 3)
    assert "was called" in seen.remarks[0]
    described = make_outline(config, Given(shape=(20,), dtype=torch.int64, classes=5))
    assert (described.example.shape, described.example.objective) == ((20,), None)
    plan = plan_of(config, described.model, world_size=1, costs=None)
    assert rehearse(plan, described, examples=8, micro_batches=2).fault == ""


def test_a_model_that_needs_values_to_be_made_is_made_in_memory() -> None:
    outline = make_outline(_config(f'model.name="{MODELS}:valued"'), Given())
    assert {parameter.device.type for parameter in outline.model.parameters()} == {"meta"}
    assert "can't be made on the meta device" in outline.remarks[0]


def test_a_model_that_branches_on_values_leaves_figures_unknown() -> None:
    config = _config(f'model.name="{MODELS}:branching"')
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=2, costs=None)
    rehearsal = rehearse(plan, outline, examples=8, micro_batches=1)
    assert "meta tensors" in rehearsal.fault
    assert (rehearsal.flops, rehearsal.activations, rehearsal.measured, dict(rehearsal.inverting)) == (None,) * 3 + (
        {},
    )
    assert rehearsal.coverage == plan.coverage


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_other_fisher_matrices_are_rehearsed_too(fisher: str) -> None:
    config = _config(f'preconditioner.fisher="{fisher}"')
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=2, costs=None)
    rehearsal = rehearse(plan, outline, examples=8, micro_batches=1)
    assert (rehearsal.fault, rehearsal.coverage.share) == ("", 1.0)


def test_what_isnt_measured_is_found_out_by_the_rehearsal() -> None:
    config = _config(f'model.name="{MODELS}:squashed"', 'preconditioner.method="kfac"')
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=1, costs=None)
    assert plan.coverage.share == 1.0
    said = {row.parameter: row.inversion for row in rehearse(plan, outline, examples=8, micro_batches=1).coverage.rows}
    assert "used by exp, which can't be measured" in said["log_scale"]
