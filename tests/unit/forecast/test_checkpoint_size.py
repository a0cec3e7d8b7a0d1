"""The room that checkpoints take, beside one that a run has written."""

from pathlib import Path

import pytest
import torch

from kfdist.comm.communicator import Communicator
from kfdist.config import load_config
from kfdist.forecast.checkpoint_size import checkpoint_bytes
from kfdist.training.worker import train_together
from tests.support.training import SMALL


@pytest.mark.parametrize("statistics", ["per-rank", "folded", "moments in the inverses"])
def test_it_is_about_what_a_run_writes(statistics: str, tmp_path: Path) -> None:
    lines = ["model.settings.hidden=[128, 96]", "run.steps=10", "cluster.workers=1", "optimizer.lr=0.001"]
    if statistics == "moments in the inverses":
        lines += ["preconditioner.method=ekfac-adam", "optimizer.name=kfdist"]
    else:
        lines += [f'checkpoint.statistics="{statistics}"', "optimizer.name=adamw"]
    lines += [f'run.dir="{tmp_path / "run"}"']
    lines += ["preconditioner.adoption=fixed-lag", "preconditioner.lag=0"]  # with nothing under way at the end
    (tmp_path / "run.toml").write_text(SMALL)
    config = load_config(tmp_path / "run.toml", environment={}, overrides=lines)
    train_together(config, Communicator(None), torch.device("cpu"))
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    expected = checkpoint_bytes(config)
    assert expected == pytest.approx(sum(file.stat().st_size for file in written.iterdir()), rel=0.15)


def test_data_of_ones_own_arent_loaded_for_it() -> None:
    config = load_config(None, environment={}, overrides=['data.name="tests.support.outlined_models:tokens"'])
    assert checkpoint_bytes(config) is None
