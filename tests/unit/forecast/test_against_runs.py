"""What is foretold of memory and bytes, beside what a run of the same configuration really holds and sends."""

from dataclasses import dataclass

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import Config, load_config
from kfdist.curvature.auto import MeasuredCosts
from kfdist.optim.optimizer import Optimizer
from kfdist.training.run_state import Standing, Training
from kfdist.training.setup import gather_materials, make_training
from tests.support.forecasts import Foretold, foretold
from tests.support.held import held_since, storages

STEPS = 21
"""The first step and two inverse periods."""

COMMON = [
    'cluster.link="local"',
    "cluster.workers=1",
    f"run.steps={STEPS}",
    'preconditioner.adoption="fixed-lag"',  # every job is done and adopted
    "preconditioner.lag=1",
]
MODELS = "tests.support.outlined_models"

pytestmark = pytest.mark.filterwarnings("ignore:.*output gradients are exactly zero:kfdist.errors.KfdistWarning")
"""The digits run takes steps that are too long, for as few as there are: it is what it sends that counts."""

CONFIGURATIONS = {
    "digits": [],
    "low rank": [
        'optimizer.name="sgd"',
        "data.micro_batches=2",
        "preconditioner.settings={ rank = 128, direction_error = 0 }",
    ],
    "kfc": [
        f'model.name="{MODELS}:convolutions"',
        'preconditioner.method="kfac-eigen"',
        'optimizer.name="sgd"',
        "data.batch_size=16",
    ],
    "bases more often than inverses": [
        'preconditioner.method="ekfac-adam"',
        "preconditioner.settings={ basis_period = 4 }",
        "preconditioner.factor_period=2",
        "preconditioner.inverse_period=20",
    ],
    "transformer": [
        f'model.name="{MODELS}:tagger"',
        f'data.name="{MODELS}:tokens"',
        'preconditioner.method="rs-kfac"',
        "preconditioner.settings={ rank = 24 }",
        'optimizer.name="adamw"',
        "data.batch_size=16",
    ],
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A forecast, and what a run of the same configuration held after its last step and had sent by then."""

    name: str
    foretold: Foretold
    held: int
    sent: dict[str, int]


def _run(config: Config) -> tuple[int, dict[str, int]]:
    """Trains, and returns what was held at the end, and what was sent."""
    before = storages()
    materials = gather_materials(config, 1, torch.device("cpu"), MeasuredCosts(rates={}))
    training = make_training(config, Communicator(None), materials, epoch=1, standing=Standing())
    _train(training, config)
    held = held_since(before, training.data, training.preconditioner)
    sent = training.preconditioner.counters()["bytes"]
    training.preconditioner.close()
    training.reducer.close()
    training.feed.close()
    return held, sent


def _train(training: Training, config: Config) -> None:
    data, parts = training.data, config.data.micro_batches
    size = config.data.batch_size // parts
    for step in range(STEPS):
        training.optimizer.zero_grad(set_to_none=True)
        for part in range(parts):
            begin = (step * parts + part) * size % (len(data.train) - size)
            inputs, targets = data.train.inputs[begin : begin + size], data.train.labels[begin : begin + size]
            (data.objective.loss(training.model(inputs), targets) / parts).backward()
        training.reducer.reduce()
        if not isinstance(training.optimizer, Optimizer):  # which asks for its directions itself
            training.preconditioner.step()
        training.optimizer.step()


SLOW = {"low rank", "bases more often than inverses"}
"""Whose layers other configurations have, too."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CONFIGURATIONS],
)
def seen(request: pytest.FixtureRequest) -> Seen:
    config = load_config(None, environment={}, overrides=[*COMMON, *CONFIGURATIONS[request.param]])
    expected = foretold(config, steps=STEPS)
    held, sent = _run(config)
    return Seen(name=request.param, foretold=expected, held=held, sent=sent)


def test_a_rank_holds_what_was_foretold(seen: Seen) -> None:
    assert seen.foretold.lasting == pytest.approx(seen.held, rel=0.1)


@pytest.mark.parametrize("purpose", ["statistics", "jobs", "results", "snapshots"])
def test_a_run_sends_what_was_foretold(seen: Seen, purpose: str) -> None:
    # Bases of the first step have no more eigenvectors than the few rows that they are of.
    below = 0.25 if seen.name == "digits" and purpose in ("results", "snapshots") else 0.1
    assert (1 - below) * seen.foretold.sent[purpose] <= seen.sent[purpose] <= 1.1 * seen.foretold.sent[purpose]


def test_what_ranks_agree_on_is_foretold_but_for_the_rounds_of_waits(seen: Seen) -> None:
    expected = seen.foretold.sent
    assert 0.9 * expected["table"] < seen.sent["table"] < 3 * expected["table"]
    assert sum(expected.values()) == pytest.approx(sum(seen.sent.values()), rel=0.1)
