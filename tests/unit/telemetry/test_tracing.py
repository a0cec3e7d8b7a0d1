"""Traces are off unless asked for, cost nothing then, and say what they lack when they are."""

import subprocess
import sys

import pytest

from kfdist.errors import ConfigError
from kfdist.telemetry import tracing
from kfdist.telemetry.tracing import SWITCH, Tracing, check_traceable


def test_off_by_default_and_nothing_of_opentelemetry_is_loaded():
    look = (
        "import sys; from kfdist.telemetry.tracing import Tracing, check_traceable; check_traceable();"
        "hop = Tracing('x', run='a').begin('job', group='fc'); hop.end(fault='no');"
        "print(hop.traceparent == '', hop.metadata == (), any('opentelemetry' in name for name in sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["True", "True", "False"]


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("wanted")
def test_a_hop_is_named_to_the_next_process_as_w3c_says():
    made = Tracing("kfdist-test", run="digits")
    job = made.begin("job", at_ns=1_000, group="fc")
    kind, trace, span, flags = job.traceparent.split("-")
    assert (kind, len(trace), len(span), int(flags, 16) & 1) == ("00", 32, 16, 1)  # 1: it is kept
    assert job.metadata == (("traceparent", job.traceparent),)
    inner = made.begin("courier", parent=job.traceparent)
    assert inner.traceparent.split("-")[1] == trace != made.begin("job").traceparent.split("-")[1]
    assert made.begin("owner", parent="nonsense").traceparent.split("-")[1] != trace


@pytest.mark.usefixtures("wanted")
def test_without_the_extra_a_rank_says_so_and_others_go_without(monkeypatch, caplog):
    monkeypatch.setattr(tracing, "_EXPORTER", "kfdist_has_no_such.exporter")
    with pytest.raises(ConfigError, match=r"OTEL_TRACES_EXPORTER is 'otlp'.*pip install 'kfdist\[otel\]'"):
        check_traceable()
    assert Tracing("kfdist-owner").begin("owner").traceparent == ""
    assert "no traces" in caplog.text
