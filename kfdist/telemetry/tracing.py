"""Traces of jobs: a span for each hop of a job's way, by OpenTelemetry, for those who ask for it (the extra `otel`).

Off unless OTEL_TRACES_EXPORTER is "otlp"; then OpenTelemetry's own variables say where spans go, over HTTP. Couriers
and owners send them. Ranks load nothing of it: they tell their courier when a job began and its result was taken.
"""

import logging
import os
from importlib.util import find_spec
from typing import Any

from kfdist.errors import ConfigError

_LOG = logging.getLogger(__name__)

SWITCH = "OTEL_TRACES_EXPORTER"
"""The environment variable that turns traces on."""

HEADER = "traceparent"
"""What carries a job's trace to the next process (W3C Trace Context)."""

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_FLUSH_MILLISECONDS = 1000


def traced() -> bool:
    """Says whether traces are asked for."""
    return os.environ.get(SWITCH) == "otlp"


def check_traceable() -> None:
    """Checks that traces can be made if they are asked for.

    Raises:
        ConfigError: Something that they need isn't installed.
    """
    if traced() and not _installed():
        raise ConfigError(
            f"{SWITCH} is 'otlp', and OpenTelemetry's exporter isn't installed; `pip install 'kfdist[otel]'` here and "
            "on the machines of owners, or unset the variable"
        )


def _installed() -> bool:
    try:
        return find_spec(_EXPORTER) is not None
    except ModuleNotFoundError:
        return False


class Hop:
    """A part of a job's way, as a span; nothing where there are no traces."""

    def __init__(self, span: Any = None) -> None:
        """Wraps a span of OpenTelemetry."""
        self._span = span

    @property
    def traceparent(self) -> str:
        """Names it to the next process; empty without traces."""
        if self._span is None:
            return ""
        own = self._span.get_span_context()
        return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The same as metadata of a call."""
        return ((HEADER, self.traceparent),) if self._span is not None else ()

    def end(self, *, at_ns: int | None = None, fault: str = "") -> None:
        """Ends it.

        Args:
            at_ns: When it ended, in nanoseconds since 1970; now if None.
            fault: Why it failed; empty if it didn't.
        """
        if self._span is None:
            return
        if fault:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, fault))
        self._span.end(end_time=at_ns)


class Tracing:
    """Makes the hops of one process, and sends them in a thread of its own."""

    def __init__(self, service: str, **facts: str | int) -> None:
        """Begins to send if traces are asked for and can be made.

        Args:
            service: What the process is, `service.name` of its spans.
            facts: What is true of all of them.
        """
        self._provider: Any = None
        if traced():
            if _installed():
                self._provider = _provider(service, facts)
            else:
                _LOG.warning("%s is 'otlp', and the extra kfdist[otel] isn't installed here: no traces", SWITCH)

    def begin(
        self, name: str, *, parent: Hop | str = "", at_ns: int | None = None, **attributes: str | int | float
    ) -> Hop:
        """Begins a hop.

        Args:
            name: What it is called.
            parent: The hop that it is a part of, or its `traceparent`; a trace of its own begins where that is empty.
            at_ns: When it began, in nanoseconds since 1970; now if None.
            attributes: What is known of it.
        """
        if self._provider is None:
            return Hop()
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        known = parent.traceparent if isinstance(parent, Hop) else parent
        context = TraceContextTextMapPropagator().extract({HEADER: known})
        tracer = self._provider.get_tracer("kfdist")
        return Hop(tracer.start_span(name, context=context, start_time=at_ns, attributes=attributes))

    def flush(self) -> None:
        """Sends what is left, for a second at most."""
        if self._provider is not None:
            self._provider.force_flush(_FLUSH_MILLISECONDS)


def _provider(service: str, facts: dict[str, str | int]) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": service, **{f"kfdist.{name}": value for name, value in facts.items()}})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # a collector that hangs delays no end
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
