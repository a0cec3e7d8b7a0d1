"""The trainer's own step on a device, as `kfdist train` makes it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.data.images import IMAGENET
from kfdist.training.checkpoint import CheckpointStore
from kfdist.training.copies import Copies
from kfdist.training.history import History
from kfdist.training.progress import Progress
from kfdist.training.reporting import MetricsLog
from kfdist.training.run_state import Standing
from kfdist.training.setup import gather_materials, make_training
from kfdist.training.trainer import Trainer

CONFIG = """
[run]
steps = 400
[data]
name = "synthetic"
batch_size = 8
micro_batches = 2
settings = { shape = [2, 8, 8], train_examples = 64, noise = 3.0 }
[model]
name = "digits-cnn"
[optimizer]
name = "sgd"
average_decay = 0.9
[preconditioner]
method = "rs-kfac"
settings = { rank = 6 }
factor_period = 2
inverse_period = 8
[cluster]
link = "local"
[checkpoint]
period = 0
"""


@pytest.fixture
def trainer(request: pytest.FixtureRequest, device: torch.device, tmp_path: Path) -> Iterator[Trainer]:
    (tmp_path / "run.toml").write_text(CONFIG)
    given = [f"run.dir={tmp_path / 'run'}", f"run.precision={request.param}"]
    config = load_config(tmp_path / "run.toml", overrides=given, environment={})
    world = Communicator(None)
    materials = gather_materials(config, 1, device, None)
    training = make_training(config, world, materials, epoch=1, standing=Standing())
    store = CheckpointStore(tmp_path / "checkpoints", Copies.one(world), keep=1)
    log = MetricsLog(None)
    history = History(training, log)
    yield Trainer(training, Standing(), store=store, log=log, history=history, progress=Progress())
    training.preconditioner.close()
    training.reducer.close()


def advance(trainer: Trainer) -> None:
    """A step, and what only the loop would do after it."""
    trainer._step()
    now = trainer.standing
    trainer.standing = Standing(step=now.step + 1, position=trainer._training.sampler.advance(now.position))


@pytest.mark.parametrize("trainer", ["bfloat16", "float32"], indirect=True)
def test_a_step_does_not_wait_for_the_device(
    trainer: Trainer, device: torch.device, without_waiting: Callable[[], AbstractContextManager[None]]
):
    for _ in range(3):
        advance(trainer)
    with without_waiting():
        for _ in range(4):  # less than an epoch, whose order is copied to the device
            advance(trainer)
    assert trainer._training.device.type == device.type
    assert all(bool(each.isfinite().all()) for each in trainer._training.model.parameters())


@pytest.mark.parametrize("trainer", ["float16"], indirect=True)
def test_in_half_precision_the_loss_is_scaled_and_falls(trainer: Trainer, device: torch.device):
    assert trainer._training.scaler.is_enabled()
    losses = []
    for step in range(12):
        before = float(trainer._tally[0])
        advance(trainer)
        losses.append(float(trainer._tally[0]) - before)
        assert all(bool(each.isfinite().all()) for each in trainer._training.model.parameters()), f"step {step}"
    assert min(losses[6:]) < losses[0]


def test_pixels_are_normalised_without_a_wait(
    device: torch.device, without_waiting: Callable[[], AbstractContextManager[None]]
):
    pixels = torch.arange(48, dtype=torch.uint8, device=device).view(1, 3, 4, 4)
    with without_waiting():
        numbers = IMAGENET(pixels)
    assert numbers[0, 0, 0, 1].item() == pytest.approx((1 / 255 - 0.485) / 0.229, abs=1e-6)
