"""A step that a stop interrupts isn't done, and counts in nothing that is told of the run."""

import json
import re
from pathlib import Path

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.errors import Interrupted
from kfdist.runtime.settings import StepReport
from kfdist.training.checkpoint import CheckpointStore
from kfdist.training.copies import Copies
from kfdist.training.history import History
from kfdist.training.progress import Progress
from kfdist.training.reporting import MetricsLog
from kfdist.training.run_state import Standing
from kfdist.training.setup import gather_materials, make_training
from kfdist.training.trainer import Trainer, after_lacking_checkpoint
from tests.support.training import SMALL


def test_means_are_of_the_steps_that_were_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    given = [f"run.dir={tmp_path / 'run'}", "run.log_period=4"]
    config = load_config(tmp_path / "small.toml", overrides=given, environment={})
    world = Communicator(None)
    training = make_training(
        config, world, gather_materials(config, 1, torch.device("cpu"), None), epoch=1, standing=Standing()
    )
    log = MetricsLog(tmp_path)
    trainer = Trainer(
        training,
        Standing(),
        store=CheckpointStore(tmp_path / "checkpoints", Copies.one(world), keep=1),
        log=log,
        history=History(training, log),
        progress=Progress(),
    )
    preconditioner, make_step = training.preconditioner, training.preconditioner.step

    def step() -> StepReport:
        if preconditioner.next_step == 5:
            raise Interrupted("somebody asked to stop", reason="stop")
        return make_step()

    monkeypatch.setattr(preconditioner, "step", step)
    # Every example counts as right: whatever is counted too often is above 100 %.
    every = lambda _, output, targets: torch.tensor([float(len(targets))])  # noqa: E731
    monkeypatch.setattr(type(training.data.objective), "measure", every)
    assert trainer.run() == "somebody asked to stop"
    preconditioner.close()
    training.reducer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["accuracy"]) for line in lines if line["event"] == "step"] == [(4, 1.0), (5, 1.0)]
    assert len(trainer.input_seconds) == len(trainer.step_seconds) == 5


@pytest.mark.parametrize(
    ("step", "saved_step", "last", "words"),
    [
        (20, 10, False, "the run goes on, and older checkpoints are kept; make room before the next one"),
        (20, 0, False, "the run goes on, and there is none yet; make room before the next one"),
        (
            20,
            10,
            True,
            "older checkpoints are kept; make room first: the last 10 steps are in no checkpoint; .*step 10",
        ),
        (20, 0, True, "there is none yet; make room first: the last 20 steps are in no checkpoint; .*step 0"),
        (10, 10, True, "older checkpoints are kept, and no step is lost; make room first"),
        (0, 0, True, "there is none yet, and no step is lost; make room first"),
    ],
)
def test_a_lacking_checkpoint_is_told_with_what_is_kept_and_lost(
    step: int, saved_step: int, last: bool, words: str
) -> None:
    assert re.fullmatch(words, after_lacking_checkpoint(step, saved_step, last=last))
