"""What of a configuration only the data can refuse."""

from pathlib import Path

import pytest
import torch

from kfdist.config import load_config
from kfdist.errors import ConfigError
from kfdist.training.setup import gather_materials

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("option", "path", "words"),
    [
        ("run.target_accuracy=0.9", "run.target_accuracy", 'is 0.9, but .* measures distance.*"accuracy"'),
        ("preconditioner.fisher=mc", "preconditioner.fisher", "is 'mc', but .* choose \"empirical\""),
    ],
)
def test_what_an_objective_does_not_say_is_not_waited_for(
    option: str, path: str, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    config = load_config(ROOT / "examples" / "own_task.toml", overrides=[option], environment={})
    with pytest.raises(ConfigError, match=words) as caught:
        gather_materials(config, 1, torch.device("cpu"))
    assert caught.value.path == path
