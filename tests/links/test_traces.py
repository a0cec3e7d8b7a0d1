"""The trace of a job's way: rank, courier, owner, child, and back; slow inversions and faults show in it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from kfdist.telemetry.tracing import SWITCH
from tests.support.faults import EACH
from tests.support.jobs import collect, job, payload
from tests.support.owners import OwnerProcess
from tests.support.waits import eventually

HOPS = ["job", "courier", "attempt", "owner", "child", "attempt", "owner", "child", "back"]


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, as a collector does, and keeps the spans with the service that sent each."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    def take(self, request: ExportTraceServiceRequest) -> None:
        for of_process in request.resource_spans:
            facts = {each.key: each.value.string_value for each in of_process.resource.attributes}
            for scope in of_process.scope_spans:
                self.spans += [(facts["service.name"], span) for span in scope.spans]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.take(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """Listens, and has the processes that the test starts send their spans there, uncompressed and soon."""
    with Collector() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv(SWITCH, "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield running
        running.shutdown()


def test_a_jobs_way_is_one_trace_with_a_span_for_each_hop(collector, controller, start_link, tmp_path, faults):
    faults.at(inversion=EACH, times=1).kill()
    faults.at(inversion=EACH, times=2).delay(0.4)
    with OwnerProcess("owner-0", folder=tmp_path, controller=controller.address) as owner:
        eventually(lambda: owner.status()["registered"], bool, seconds=60)
        link = start_link(controller.address)
        link.submit(job("fc", version=7, data=payload(24, seed=1)))
        collect(link, 1)
        link.close()
        eventually(lambda: len(collector.spans), lambda seen: seen == len(HOPS), seconds=30)
    spans = [span for _, span in sorted(collector.spans, key=lambda found: found[1].start_time_unix_nano)]
    assert sorted(span.name for span in spans) == sorted(HOPS)
    assert len({span.trace_id for span in spans}) == 1
    by_id = {span.span_id: span for span in spans}
    parents = {(span.name, by_id[span.parent_span_id].name if span.parent_span_id else "") for span in spans}
    assert parents == {
        ("job", ""),
        ("courier", "job"),
        ("attempt", "courier"),
        ("owner", "attempt"),
        ("child", "owner"),
        ("back", "job"),
    }
    for span in spans:
        parent = by_id.get(span.parent_span_id, span)
        assert parent.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        # A courier may have all of an answer before the owner's call is over.
        assert span.end_time_unix_nano <= parent.end_time_unix_nano or span.name == "owner"
    (whole,) = [span for span in spans if span.name == "job"]
    facts = {each.key: each.value.string_value or each.value.int_value for each in whole.attributes}
    assert (facts["group"], facts["version"]) == ("fc", 7)
    failed, done = [span for span in spans if span.name == "child"]
    assert failed.status.code == Status.STATUS_CODE_ERROR and "in the middle of an inversion" in failed.status.message
    assert done.status.code == Status.STATUS_CODE_UNSET
    assert (done.end_time_unix_nano - done.start_time_unix_nano) / 1e9 >= 0.4, "the slow hop is the child's"
    assert {service for service, span in collector.spans if span.name in ("owner", "child")} == {"kfdist-owner"}
    assert {service for service, span in collector.spans if span.name in ("job", "back")} == {"kfdist-courier"}
