import os
import shutil
import sys
import time
from pathlib import Path

from kfdist.launch import supervision
from kfdist.launch.supervision import SupervisedProcess
from kfdist.system.processes import Child, Command

# Serves until told to die, or dies at once, depending on a file.
_SCRIPT = """
import json, pathlib, sys, time
ready, fate = map(pathlib.Path, sys.argv[1:3])
if fate.read_text() == "die":
    sys.exit(5)
part = ready.with_suffix(".part")  # whole, or not there: it is read at any moment
part.write_text(json.dumps({"arguments": sys.argv[3:]}))
part.replace(ready)
while fate.read_text() == "serve":
    time.sleep(0.02)
sys.exit(5)
"""


def _service(tmp_path: Path, fate: str, log: Path | None = None) -> SupervisedProcess:
    (tmp_path / "fate").write_text(fate)
    ready = tmp_path / "ready.json"

    def command(restarts: int) -> Command:
        line = (sys.executable, "-c", _SCRIPT, str(ready), str(tmp_path / "fate"), f"--restarts={restarts}")
        environment = dict(os.environ)
        return Command(name="service", line=line, environment=environment, log=log or tmp_path / "service.log")

    return SupervisedProcess(command, ready)


def _events(service: SupervisedProcess, until, seconds: float = 15.0) -> list[str]:
    events = []
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, events
        if (event := service.supervise()) is not None:
            events.append(event)
        time.sleep(0.02)
    return events


def test_a_dead_service_is_started_again_with_a_command_of_its_own(tmp_path: Path):
    service = _service(tmp_path, "serve")
    assert _events(service, until=service.ready) == []
    (tmp_path / "fate").write_text("stop")
    events = _events(service, until=lambda: service.child is None)
    assert "exited with 5" in events[0] and service.ready() is None
    (tmp_path / "fate").write_text("serve")
    events = _events(service, until=service.ready)
    assert "started again" in events[0]
    assert service.ready() == {"arguments": ["--restarts=1"]}
    assert service.restarts == 1 and not service.gave_up
    assert service.reports() == [{"arguments": ["--restarts=0"]}, {"arguments": ["--restarts=1"]}]
    (tmp_path / "fate").write_text("stop")
    _events(service, until=lambda: service.child is None)


def test_a_service_that_keeps_dying_is_given_up(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(supervision, "_FIRST_PAUSE_SECONDS", 0.01)
    service = _service(tmp_path, "die")
    events = _events(service, until=lambda: service.gave_up)
    assert service.restarts == supervision.RESTARTS_ALLOWED
    assert sum("was started again" in event for event in events) == supervision.RESTARTS_ALLOWED
    assert "isn't started again" in events[-1]
    assert service.supervise() is None and service.child is None


def test_a_log_directory_that_was_removed_is_made_again(tmp_path: Path):
    service = _service(tmp_path, "serve", log=tmp_path / "logs" / "service.log")
    _events(service, until=service.ready)
    shutil.rmtree(tmp_path / "logs")
    (tmp_path / "fate").write_text("stop")
    _events(service, until=lambda: service.child is None)
    (tmp_path / "fate").write_text("serve")
    assert "started again" in _events(service, until=service.ready)[0]
    assert (tmp_path / "logs" / "service.log").exists()
    (tmp_path / "fate").write_text("stop")
    _events(service, until=lambda: service.child is None)


def test_a_service_that_the_system_refuses_to_start_is_tried_until_it_starts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(supervision, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "_RETRY_SECONDS", 0.01)
    service = _service(tmp_path, "die")
    refusals = [OSError(24, "Too many open files")] * 9
    start = supervision.Child

    def child(command: Command) -> Child:
        if refusals:
            raise refusals.pop()
        return start(command)

    monkeypatch.setattr(supervision, "Child", child)
    events = _events(service, until=lambda: service.child is None)
    (tmp_path / "fate").write_text("serve")
    events = _events(service, until=service.ready)
    assert "can't be started again ([Errno 24] Too many open files)" in events[0]
    assert "started again (1 of" in events[1] and len(events) == 2
    (tmp_path / "fate").write_text("stop")
    _events(service, until=lambda: service.child is None)
    refusals.append(OSError(24, "Too many open files"))
    (tmp_path / "fate").write_text("serve")
    told_anew, _ = _events(service, until=service.ready)
    assert "can't be started again" in told_anew
    (tmp_path / "fate").write_text("stop")
    _events(service, until=lambda: service.child is None)
