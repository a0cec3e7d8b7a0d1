"""What is foretold of memory and bytes, beside what a run of the same configuration really holds and sends."""

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.config import Config, load_config
from kfdist.curvature.auto import MeasuredCosts
from kfdist.forecast.inversion_costs import measure
from kfdist.forecast.outline import Given, make_outline
from kfdist.forecast.rank_memory import rank_lines
from kfdist.forecast.rehearsal import rehearse
from kfdist.forecast.traffic import TrafficForecast
from kfdist.training.method import plan_of
from kfdist.training.run_state import Standing, Training
from kfdist.training.setup import gather_materials, make_training

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

CONFIGURATIONS = {
    "digits": ["data.micro_batches=2"],
    "kfc": [
        f'model.name="{MODELS}:convolutions"',
        'preconditioner.method="kfac-eigen"',
        "data.batch_size=16",
    ],
    "transformer": [
        f'model.name="{MODELS}:tagger"',
        f'data.name="{MODELS}:tokens"',
        'preconditioner.method="rs-kfac"',
        "preconditioner.settings={ rank = 24 }",
        'optimizer.name="adamw"',
        "data.batch_size=16",
    ],
    "seng": [
        f'model.name="{MODELS}:convolutions"',
        'preconditioner.method="seng"',
        "preconditioner.settings={ examples = 32, columns = 4 }",
        "data.batch_size=32",
    ],
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A forecast, and what a run of the same configuration held after its last step and had sent by then."""

    lasting: int
    sent: dict[str, float | None]
    held: int
    really_sent: dict[str, int]


def _storages() -> dict[int, int]:
    """Returns the bytes of all memory that tensors of this process show, by its address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    tensors += [each.grad for each in tensors if each.is_leaf and each.grad is not None]
    real = [each.untyped_storage() for each in tensors if each.device.type == "cpu" and each.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in real if storage.nbytes()}


def _run(config: Config) -> tuple[int, dict[str, int]]:
    """Trains, and returns what was held at the end, the data set left out, and what was sent."""
    before = _storages()
    materials = gather_materials(config, 1, torch.device("cpu"), MeasuredCosts(rates={}))
    training = make_training(config, Communicator(None), materials, epoch=1, standing=Standing())
    _train(training, config)
    held = sum(size for address, size in _storages().items() if address not in before)
    data = materials.data
    held -= sum(each.untyped_storage().nbytes() for part in (data.train, data.test) for each in vars(part).values())
    held += sum(len(track.snapshot.payload) for track in training.preconditioner.pipeline.tracks)
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
        training.preconditioner.step()
        training.optimizer.step()


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def seen(request: pytest.FixtureRequest) -> Seen:
    config = load_config(None, environment={}, overrides=[*COMMON, *CONFIGURATIONS[request.param]])
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=1, costs=None)
    rehearsal = rehearse(plan, outline, examples=config.data.batch_size, micro_batches=config.data.micro_batches)
    assert rehearsal.fault == ""
    costs = measure(plan.groups, threads=1)
    lines = rank_lines(config, plan, rehearsal, costs)
    assert all(line.bytes is not None for line in lines)
    held, sent = _run(config)
    return Seen(
        lasting=sum(line.bytes or 0 for line in lines if not line.passing),
        sent={each.purpose: each.total for each in TrafficForecast(config, plan, rehearsal, costs).over(STEPS)},
        held=held,
        really_sent=sent,
    )


def test_a_rank_holds_what_was_foretold(seen: Seen) -> None:
    assert seen.lasting == pytest.approx(seen.held, rel=0.1)


@pytest.mark.parametrize("purpose", ["statistics", "jobs", "results", "snapshots"])
def test_a_run_sends_what_was_foretold(seen: Seen, purpose: str) -> None:
    assert seen.sent[purpose] == pytest.approx(seen.really_sent[purpose], rel=0.1)


def test_what_ranks_agree_on_is_foretold_but_for_the_rounds_of_waits(seen: Seen) -> None:
    foretold = seen.sent["table"]
    assert foretold is not None
    assert 0.9 * foretold < seen.really_sent["table"] < 3 * foretold
    assert sum(filter(None, seen.sent.values())) == pytest.approx(sum(seen.really_sent.values()), rel=0.1)
