"""What docs/large-batch.md says of keys, metrics, recipes and numbers is so."""

import re
from pathlib import Path

import pytest

from kfdist.config import Config, load_config
from kfdist.config.recipes import recipes
from kfdist.telemetry.metrics import METRICS

PAGE = (Path(__file__).parents[2] / "docs" / "large-batch.md").read_text(encoding="utf-8")
QUOTED = set(re.findall(r"`([^`\n]+)`", PAGE))


def test_keys_metrics_and_recipes_exist():
    keys = [
        each.split(" = ")[0] for each in QUOTED if re.match(r"(data|optimizer|preconditioner)\.[a-z_]+( = .*)?$", each)
    ]
    assert len(keys) >= 6
    for key in keys:
        section, name = key.split(".")
        assert name in type(getattr(Config(), section)).model_fields, key
    assert {each for each in QUOTED if each.startswith("kfdist_")} <= set(METRICS)
    assert {each for each in QUOTED if each.startswith(("imagenet-", "cifar10-"))} <= set(recipes())


def test_gains_follow_from_the_formula():
    rows = re.findall(r"^\| (\d* ?)B_simple( / 4)? \| (\d+) % \| ([\d.]+) times \|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 4
    for times, quarter, gain, examples in rows:
        batch = 0.25 if quarter else float(times or 1)
        assert round(100 / (1 + 1 / batch)) == int(gain)
        assert 1 + batch == float(examples)


def test_the_first_row_by_batch_is_the_recipes():
    config = load_config(Path("imagenet-resnet50-spngd"), environment={})
    row = next(line for line in PAGE.splitlines() if line.startswith("| 4,096 |"))
    rate, momentum, decay, epochs, damping = (cell.strip() for cell in row.split("|")[2:7])
    optimizer = config.optimizer
    assert (float(rate), float(momentum), int(epochs)) == (optimizer.lr, optimizer.momentum, config.run.epochs)
    assert float(damping) == pytest.approx(config.preconditioner.damping)
    assert decay == f"e0 = 1, e1 = {optimizer.decay_epochs}, p = {optimizer.power:g}"
    assert config.data.batch_size * config.cluster.workers == 4096
