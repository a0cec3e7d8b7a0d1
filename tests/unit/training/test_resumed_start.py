"""What a start that resumes a run tells the controller before it has made a step."""

from pathlib import Path

import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.training.run_state import Standing
from kfdist.training.setup import gather_materials, make_training
from tests.support.controller import ControllerThread
from tests.support.training import SMALL
from tests.support.waits import eventually


def test_the_controller_hears_first_of_the_step_that_the_start_goes_on_with(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    with ControllerThread(tmp_path / "control.sqlite") as controller, controller.client() as client:
        given = [f"run.dir={tmp_path / 'run'}", "cluster.link=service", f"control.address={controller.address}"]
        config = load_config(tmp_path / "small.toml", overrides=given, environment={})
        materials = gather_materials(config, 1, torch.device("cpu"), None)
        training = make_training(config, Communicator(None), materials, epoch=2, standing=Standing(step=12))
        try:
            eventually(lambda: [run.state for run in client.runs()], lambda seen: seen == ["running"], seconds=30)
        finally:
            training.preconditioner.abandon()
            training.reducer.close()
            training.feed.close()
        texts = [event.text for event in client.events(config.run.name) if event.kind == "running"]
    assert texts == ["created -> running at step 12"]
