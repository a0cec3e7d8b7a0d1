"""What the ranks' driver says and leaves; without Ray."""

import json
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kfdist.config import load_config
from kfdist.errors import EnvironmentFault
from kfdist.launch.submission import train_driver
from kfdist.launch.submission.request import Submission
from kfdist.launch.submission.train_driver import LostRoom, _conclude, _fault, _fit, drive_ranks
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


def test_a_job_whose_last_checkpoint_is_lacking_has_failed(tmp_path: Path):
    config = load_config(None, overrides=[f"run.dir={tmp_path}"], environment={})
    done = {"status": "finished", "steps": 35, "seconds": 2.0}
    assert _conclude(config, done) == _conclude(config, {**done, "unsaved_steps": 0}) == 0
    with pytest.raises(EnvironmentFault, match=r"the last 5 steps are in no checkpoint.*from step 30.*submit again"):
        _conclude(config, {**done, "unsaved_steps": 5})
    assert json.loads((tmp_path / "summary.json").read_text())["unsaved_steps"] == 5


def test_a_cluster_that_lost_nodes_is_told_once_each_time(capsys):
    def node(address: str, *, alive: bool = True) -> dict[str, object]:
        return {"Alive": alive, "NodeManagerAddress": address, "Resources": {"CPU": 2}, "Labels": {}}

    whole = [node("10.0.0.1"), node("10.0.0.2")]
    seen: list[Any] = [
        whole,
        [whole[0], node("10.0.0.2", alive=False)],
        whole[:1],
        RuntimeError("no head"),
        whole,
        whole[:1],
    ]

    def nodes() -> list[dict[str, object]]:
        if isinstance(found := seen.pop(0), Exception):
            raise found
        return found

    ray = SimpleNamespace(nodes=nodes, util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1"))
    room = LostRoom(ray, load_config(None, overrides=["security.certificates=/certificates"], environment={}), 0)
    while seen:
        room.look()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and told[0] == told[1]
    assert told[0].startswith(
        "the cluster has lost nodes: 2 ranks with CPU 1 each and 2 owners with CPU 1 each don't fit"
    )
    assert "10.0.0.1 has CPU 2; add nodes" in told[0]


def test_a_stop_is_passed_on_also_while_ray_does_not_say_what_nodes_there_are():
    asked, stopped, answers = (threading.Event() for _ in range(3))
    looking = threading.Event()

    def fit() -> str:
        assert looking.wait(60)
        asked.set()
        return "result" if stopped.wait(60) else "never stopped"

    def watch(training: threading.Thread) -> None:
        looking.set()
        answers.wait(60)

    board = SimpleNamespace(ask_stop=SimpleNamespace(remote=stopped.set))
    ray, room = SimpleNamespace(get=lambda call: call), SimpleNamespace(watch=watch)
    assert _fit(ray, SimpleNamespace(fit=fit), board, asked, cast(Any, room)) == "result"
    answers.set()


class Lost(Exception):
    """An actor's end."""


@pytest.fixture
def ray(monkeypatch) -> SimpleNamespace:
    """A Ray on node "head" whose board has gone; a driver finds room at once."""

    def get(call: object) -> None:
        raise Lost(call)

    made: list[dict[str, object]] = []
    actor = SimpleNamespace(remote=lambda: SimpleNamespace(refusal=SimpleNamespace(remote=lambda: "refusal")))
    fake = SimpleNamespace(
        made=made,
        get=get,
        exceptions=SimpleNamespace(RayActorError=Lost),
        get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: "head"),
        remote=lambda **options: made.append(options) or (lambda kind: actor),
    )
    monkeypatch.setattr(train_driver, "_connect", lambda config: fake)
    monkeypatch.setattr(train_driver, "_wait_for_room", lambda *_: None)
    monkeypatch.setattr(train_driver, "_trainer", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return fake


def test_the_board_shares_the_fate_of_its_driver_and_its_loss_hides_no_reason(
    ray: SimpleNamespace, tmp_path: Path, monkeypatch
):
    def fit(*_: object) -> None:
        raise EnvironmentFault("Ray Train gave up; rank 0: lost a peer")

    monkeypatch.setattr(train_driver, "_fit", fit)
    config = load_config(None, environment={})
    with pytest.raises(EnvironmentFault, match="Ray Train gave up"):
        drive_ranks(config, Submission(config="", gpus_per_worker=0, max_failures=0, storage=str(tmp_path)))
    assert ray.made == [{"num_cpus": 0, "label_selector": {"ray.io/node-id": "head"}}]
