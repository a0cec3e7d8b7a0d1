"""Ports that are taken, a controller that isn't there or isn't one, and clocks that differ."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from kfdist.config import Config, load_config
from kfdist.doctor import network_checks
from kfdist.doctor.finding import Verdict
from kfdist.doctor.network_checks import (
    check_clocks,
    check_controller,
    check_owner_ports,
    check_ports,
    check_server_port,
    compare_clocks,
)
from tests.support.controller import ControllerThread

NOW = datetime(2026, 11, 28, tzinfo=UTC)


@contextmanager
def _listening(*, server: bool = True) -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if server:
            taken.listen()
        yield taken.getsockname()[1]


def _config(**addresses: str) -> Config:
    return load_config(
        None, environment={}, overrides=[f'control.{name}="{value}"' for name, value in addresses.items()]
    )


def test_a_port_that_is_taken() -> None:
    with _listening() as port:
        found = check_server_port("controller port", f"127.0.0.1:{port}", "control.address")
        assert found.verdict is Verdict.FAILED
        assert "in use by another process" in found.seen
        assert "another control.address" in found.mend
    assert check_server_port("controller port", f"127.0.0.1:{port}", "control.address").verdict is Verdict.OK


def test_another_machines_port_is_not_looked_for_here() -> None:
    assert check_server_port("controller port", "192.0.2.1:7070", "control.address").verdict is Verdict.OK


def test_too_few_ports_for_the_owners() -> None:
    with _listening() as port:
        taken = check_owner_ports((port, port), 1)
        assert (taken.verdict, f"taken: {port}" in taken.seen) == (Verdict.FAILED, True)
    assert check_owner_ports((port, port), 2).verdict is Verdict.FAILED
    assert check_owner_ports(None, 100).verdict is Verdict.OK


def test_no_controller_is_right_here_and_wrong_elsewhere(monkeypatch) -> None:
    with _listening(server=False) as port:
        nobody = check_controller(_config(address=f"127.0.0.1:{port}"))
    assert (nobody.verdict, "`kfdist train` starts one" in nobody.seen) == (Verdict.OK, True)
    monkeypatch.setattr("kfdist.doctor.network_checks.is_elsewhere", lambda host: True)
    assert check_controller(_config(address=f"127.0.0.1:{port}")).verdict is Verdict.FAILED


def test_who_answers_may_be_no_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_checks, "SECONDS", 0.3)  # nobody will answer
    with _listening() as port:
        found = check_controller(_config(address=f"127.0.0.1:{port}"))
    assert found.verdict is Verdict.FAILED


def test_a_controller_that_answers_has_its_ports_rightly(tmp_path) -> None:
    with ControllerThread(tmp_path / "state.sqlite") as serving:
        metrics = serving.controller.metrics_address
        config = _config(address=serving.address, metrics_address=metrics)
        controller, clocks = check_controller(config), check_clocks(config)
    assert (controller.verdict, "knows 0 runs" in controller.seen) == (Verdict.OK, True)
    assert [each.check for each in check_ports(config, controller)] == ["owner ports"]
    assert clocks is not None and clocks.verdict is Verdict.OK


@pytest.mark.parametrize(
    ("seconds", "verdict"), [(-2, Verdict.OK), (60, Verdict.WARNING), (-60, Verdict.WARNING), (7200, Verdict.FAILED)]
)
def test_clocks_that_differ(seconds: int, verdict: Verdict) -> None:
    found = compare_clocks(NOW + timedelta(seconds=seconds), NOW, "host:9464")
    assert found.verdict is verdict
    if verdict is not Verdict.OK:
        assert ("behind" if seconds > 0 else "ahead") in found.seen


def test_the_controllers_clock_is_asked_for() -> None:
    class Yesterday(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True))
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Yesterday) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        found = check_clocks(_config(metrics_address=f"127.0.0.1:{server.server_port}"))
        thread.join()
    assert found is not None and found.verdict is Verdict.FAILED
    assert check_clocks(_config(metrics_address="127.0.0.1:0")) is None
