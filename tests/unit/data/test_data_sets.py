"""The bundled data sets and models: what they are, and that they are always the same."""

import subprocess
import sys

import pytest
import torch

from kfdist.data.sets import load_data, stratified_split
from kfdist.errors import ConfigError
from kfdist.models import build_model


def test_digits_are_all_there_and_divided_once():
    data = load_data("digits", {})
    assert len(data.train) + len(data.test) == 1797
    assert data.example_shape == (1, 8, 8)
    assert data.train.inputs.dtype == torch.float32
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 1)
    shares = data.test.labels.bincount() / (data.test.labels.bincount() + data.train.labels.bincount())
    assert ((shares > 0.19) & (shares < 0.21)).all()


def test_digits_are_those_of_scikit_learn_which_is_not_imported():
    from sklearn.datasets import load_digits  # here: with scipy it takes a second of each process that collects

    pixels, labels = load_digits(return_X_y=True)
    data = load_data("digits", {})
    train, test = stratified_split(torch.from_numpy(labels), 0.2, 0)
    for part, rows in ((data.train, train), (data.test, test)):
        assert torch.equal(part.inputs.flatten(1), torch.from_numpy(pixels)[rows].float() / 16)
        assert torch.equal(part.labels, torch.from_numpy(labels)[rows])
    lines = (
        "import sys",
        "from kfdist.data.sets import load_data",
        "load_data('digits', {})",
        "assert 'sklearn' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_a_data_set_is_the_same_every_time(name: str):
    one, two = load_data(name, {}), load_data(name, {})
    assert torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(one.test.labels, two.test.labels)


def test_another_seed_divides_differently_and_evenly():
    labels = torch.arange(1000) % 4
    first, second = stratified_split(labels, 0.25, 0), stratified_split(labels, 0.25, 1)
    assert not torch.equal(first[1], second[1])
    for train, test in (first, second):
        assert torch.equal(torch.cat([train, test]).sort().values, torch.arange(1000))
        assert labels[test].bincount().tolist() == [62] * 4


@pytest.mark.parametrize("name", ["digits-cnn", "mlp"])
def test_a_model_is_a_function_of_its_seed_and_leaves_the_generator_alone(name: str):
    def build(seed: int) -> torch.Tensor:
        model = build_model(name, {}, example_shape=(1, 8, 8), classes=10, seed=seed)
        assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    before = torch.get_rng_state()
    assert torch.equal(build(1), build(1))
    assert not torch.equal(build(1), build(2))
    assert torch.equal(before, torch.get_rng_state())


def test_the_digits_model_has_a_curvature_factor_worth_inverting_elsewhere():
    model = build_model("digits-cnn", {}, example_shape=(1, 8, 8), classes=10, seed=0)
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    assert first.in_features >= 1024


@pytest.mark.parametrize(
    ("call", "path", "words"),
    [
        (lambda: load_data("digit", {}), "data.name", "did you mean 'digits'"),
        (
            lambda: load_data("digits", {"test_fracton": 0.1}),
            "data.settings.test_fracton",
            "mean 'test_fraction'",
        ),
        (lambda: load_data("digits", {"test_fraction": 1.5}), "data.settings.test_fraction", "less than 1"),
        (lambda: load_data("synthetic", {"shape": "x"}), "data.settings.shape", "a list"),
        (
            lambda: build_model("digits-cn", {}, example_shape=(1, 8, 8), classes=2, seed=0),
            "model.name",
            "did you mean 'digits-cnn'",
        ),
        (
            lambda: build_model("digits-cnn", {}, example_shape=(5,), classes=2, seed=0),
            "model.name",
            r"the data has \[5\]",
        ),
        (
            lambda: build_model("mlp", {"hidden": [0]}, example_shape=(5,), classes=2, seed=0),
            r"model.settings.hidden\[0\]",
            "at least 1",
        ),
    ],
)
def test_wrong_names_and_settings_are_refused_with_the_remedy(call, path: str, words: str):
    with pytest.raises(ConfigError, match=f"^{path}: .*{words}"):
        call()
