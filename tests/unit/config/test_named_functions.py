"""Models and data of the user's own, by the path of a function: what is wrong with one is a sentence."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kfdist.data.sets import load_data
from kfdist.errors import ConfigError
from kfdist.models import build_model

OWN = """
import torch
from torch import nn
from kfdist.data import DataSet, Examples

WIDTH = 3

def data(count=4):
    examples = Examples(inputs=torch.zeros(count, 2), labels=torch.zeros(count, dtype=torch.int64))
    return DataSet(train=examples, test=examples, classes=5)

def model(example_shape, classes, width=7):
    return nn.Sequential(nn.Linear(*example_shape, width), nn.Linear(width, classes))

def no_data(): return [1, 2]
def no_examples(): return DataSet(train=3, test=3, classes=2)
def empty(): return data(count=0)
def no_model(example_shape, classes): return 3
def shapeless(width=3): return nn.Linear(width, 3)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working directory, which isn't on Python's path."""
    (tmp_path / "my_own_task.py").write_text(OWN)
    (tmp_path / "my_torn_task.py").write_text("import a_module_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_own_task", raising=False)


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    return build_model(name, settings, example_shape=(2,), classes=5, seed=1)


def test_functions_are_found_in_the_working_directory_and_given_their_settings():
    data = load_data("my_own_task:data", {"count": 6})
    assert (len(data.train), data.classes, data.example_shape) == (6, 5, (2,))
    before = torch.get_rng_state()
    one, two = (build("my_own_task:model", {"width": 9}) for _ in range(2))
    assert one(torch.zeros(3, 2)).shape == (3, 5)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("section", "name", "settings", "path", "words"),
    [
        ("data", "my_own_task:", {}, "name", 'write "package.module:function"'),
        ("data", "my own:data", {}, "name", 'write "package.module:function"'),
        ("data", "my_own_tusk:data", {}, "name", "there is no module 'my_own_tusk': .*working directory, /"),
        ("data", "my_torn_task:data", {}, "name", "importing my_torn_task failed: No module named 'a_module_nobody"),
        ("data", "my_own_task:date", {}, "name", "did you mean 'data'.*has no 'date'"),
        ("data", "my_own_task:WIDTH", {}, "name", "of type int; it must be a function"),
        ("data", "my_own_task:data", {"size": 3}, "settings", "unexpected keyword argument 'size'; data takes: count"),
        (
            "data",
            "my_own_task:no_data",
            {},
            "name",
            "no_data returned a value of type list; it must return a kfdist.data.*DataSet",
        ),
        ("data", "my_own_task:no_examples", {}, "name", "train is of type int; it must be .*__getitem__"),
        ("data", "my_own_task:empty", {}, "name", "train has no examples"),
        ("model", "my_own_task:no_model", {}, "name", "returned a value of type int; it must return a torch.nn"),
        ("model", "my_own_task:shapeless", {}, "name", "add example_shape, classes"),
        ("model", "my_own_task:model", {"depth": 1}, "settings", "unexpected keyword argument 'depth'"),
        ("model", "my_own_task.model", {}, "name", '"package.module:function", your own'),
    ],
)
def test_what_is_wrong_is_said(section: str, name: str, settings: dict[str, Any], path: str, words: str):
    with pytest.raises(ConfigError, match=words) as caught:
        (load_data if section == "data" else build)(name, settings)
    assert caught.value.path == f"{section}.{path}"
