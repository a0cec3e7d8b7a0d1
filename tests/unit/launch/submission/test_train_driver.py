"""What the ranks' driver says and leaves; without Ray."""

import json
from pathlib import Path

import pytest

from kfdist.config import load_config
from kfdist.errors import EnvironmentFault
from kfdist.launch.submission.train_driver import _conclude, _fault, _mark_storage
from kfdist.launch.submission.train_worker import Board


class GaveUp(Exception):
    worker_failures = {1: EnvironmentFault("rank 1 was killed by SIGKILL"), 0: RuntimeError("lost a peer")}


def test_what_ray_train_gave_up_for_names_every_rank():
    told = "Ray Train gave up; rank 0: lost a peer\nrank 1: rank 1 was killed by SIGKILL\nsubmit again to resume"
    assert str(_fault(GaveUp("Training failed"))) == told
    assert str(_fault(RuntimeError("no controller"))) == "Ray Train gave up; no controller\nsubmit again to resume"


def test_the_first_refusal_counts():
    board = Board()
    assert (board.refusal(), board.stop_asked()) == ("", False)
    board.refuse("run.steps: is -1")
    board.refuse("a peer has gone")
    assert board.refusal() == "run.steps: is -1"
    board.ask_stop()
    assert board.stop_asked()


def test_the_jobs_node_has_the_summary_also_where_it_shares_no_directory(tmp_path: Path, capsys):
    config = load_config(None, overrides=[f"run.dir={tmp_path}"], environment={})
    assert _conclude(config, {"status": "stopped", "steps": 35, "seconds": 2.0}) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 35
    assert capsys.readouterr().out == "stopped: 35 steps in 2.0 s; submit again to resume\n"


def test_a_storage_has_one_mark_and_a_uri_none(tmp_path: Path):
    storage = tmp_path / "storage"
    first, second = Path(_mark_storage(str(storage))), Path(_mark_storage(str(storage)))
    assert second.exists() and not first.exists()
    assert _mark_storage("s3://bucket/path") == ""


def test_a_storage_that_cannot_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(
        EnvironmentFault, match=r"can't keep checkpoints in .*file/storage \(.*\); choose another --sto"
    ):
        _mark_storage(str(tmp_path / "file" / "storage"))
