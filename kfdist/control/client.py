"""A small synchronous client of the controller for commands and the launcher; it answers with plain data."""

import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self, TypeVar

import grpc

from kfdist.control.control_records import RunState
from kfdist.errors import EnvironmentFault, KfdistError
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, membership_pb2_grpc, run_pb2, run_pb2_grpc
from kfdist.rpc.authentication import user_metadata
from kfdist.rpc.beats import samples_of, values_of
from kfdist.rpc.channels import CALL_SECONDS, open_channel
from kfdist.rpc.handshake import explain
from kfdist.rpc.status import code_of, fault_of
from kfdist.system.credentials import Credentials, Role
from kfdist.types import MetricSample, Value

WATCH_SECONDS = 60.0
"""Deadline of one call of a watch; the watch goes on with the next call, from the last revision."""

RECONNECT_SECONDS = 0.5

_STATES: Mapping[int, RunState] = {run_pb2.RunState.Value(f"RUN_STATE_{state.name}"): state for state in RunState}

Response = TypeVar("Response")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run; protos/kfdist/v1/run.proto documents the fields."""

    name: str
    state: RunState
    revision: int
    epoch: int
    step: int
    total_steps: int
    live_workers: int
    live_owners: int
    created: datetime
    directory: str
    gauges: Mapping[str, float]
    settings: Mapping[str, Value]
    settings_revision: int
    obeyed_revision: int
    obeyed_step: int
    world_size: int
    changed: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Returns what `--json` prints."""
        gauges = {name: finite_or_none(value) for name, value in self.gauges.items()}
        return {**vars(self), "state": self.state.value, "created": self.created.isoformat(), "gauges": gauges}


@dataclass(frozen=True, kw_only=True)
class OwnerView:
    """An owner that is alive, and how many groups of a run it inverts."""

    name: str
    groups: int
    draining: bool


@dataclass(frozen=True, kw_only=True)
class EventView:
    """One thing that happened in a run."""

    event_id: int
    time: datetime
    kind: str
    text: str

    def to_json(self) -> dict[str, object]:
        """Returns what `--json` prints."""
        return {**vars(self), "time": self.time.isoformat()}


class ControlClient:
    """Calls one controller. Every call has a deadline; a context manager.

    Every method raises EnvironmentFault if the controller can't be reached or refuses, and ConfigError if it was asked
    for something that doesn't exist or isn't allowed.
    """

    def __init__(
        self, address: str, credentials: Credentials | None = None, *, timeout_seconds: float = CALL_SECONDS
    ) -> None:
        """Prepares a channel; connects at the first call.

        Args:
            address: Where the controller serves gRPC, "host:port".
            credentials: What to show it; None for one that demands nothing.
            timeout_seconds: Deadline of each call.

        Raises:
            EnvironmentFault: A file of the credentials is missing or unusable.
        """
        self.address = address
        self._credentials = credentials
        self._timeout_seconds = timeout_seconds
        self._metadata = user_metadata()
        self._open()

    def _open(self) -> None:
        self._channel = open_channel(self.address, self._credentials)
        self._runs: Any = run_pb2_grpc.RunServiceStub(self._channel)
        self._membership: Any = membership_pb2_grpc.MembershipServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; safe to call twice."""
        self._channel.close()

    def create(self, name: str, *, directory: str = "", total_steps: int = 0, config: str = "") -> RunView:
        """Makes a run known, or prepares a known one for its next start.

        Args:
            name: The run's name.
            directory: Its directory, shown to users.
            total_steps: Its planned number of steps, 0 if unknown.
            config: Its resolved configuration as TOML, kept for users.
        """
        request = run_pb2.CreateRequest(name=name, directory=directory, total_steps=total_steps, config=config)
        return self._change(self._runs.Create, request)

    def get(self, name: str) -> RunView:
        """Returns a run."""
        return _run_view(self._call(self._runs.Get, run_pb2.GetRequest(name=name)).run)

    def runs(self) -> list[RunView]:
        """Returns all runs, the newest first."""
        return [_run_view(run) for run in self._call(self._runs.List, run_pb2.ListRequest()).runs]

    def pause(self, name: str) -> RunView:
        """Asks all ranks of a run to wait at the same step."""
        return self._change(self._runs.Pause, run_pb2.PauseRequest(name=name))

    def resume(self, name: str) -> RunView:
        """Lets a paused run continue."""
        return self._change(self._runs.Resume, run_pb2.ResumeRequest(name=name))

    def update_settings(self, name: str, **changes: Value | None) -> RunView:
        """Changes settings of a run's method.

        Args:
            name: The run.
            changes: Values by name (`kfdist.policies.tuning.NAMES`); None: as configured again.
        """
        values: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
        again = [key for key, value in changes.items() if value is None]
        request = run_pb2.UpdateSettingsRequest(name=name, as_configured=again, **values)
        return self._change(self._runs.UpdateSettings, request)

    def checkpoint(self, name: str) -> RunView:
        """Asks a run for a checkpoint."""
        return self._change(self._runs.Checkpoint, run_pb2.CheckpointRequest(name=name))

    def refresh(self, name: str, groups: Sequence[str] = ()) -> RunView:
        """Asks that groups (names or globs; none: all) are inverted at the step after the agreed one."""
        return self._change(self._runs.Refresh, run_pb2.RefreshRequest(name=name, groups=groups))

    def replan(self, name: str) -> RunView:
        """Deals a run's groups to owners anew, by the seconds that their inversions took."""
        return self._change(self._runs.Replan, run_pb2.ReplanRequest(name=name))

    def drain(self, owner_id: str) -> None:
        """Gives an owner no new jobs."""
        request = membership_pb2.DrainOwnerRequest(request_id=uuid.uuid4().hex, owner_id=owner_id)
        self._call(self._membership.DrainOwner, request)

    def undrain(self, owner_id: str) -> None:
        """Gives an owner jobs again."""
        request = membership_pb2.UndrainOwnerRequest(request_id=uuid.uuid4().hex, owner_id=owner_id)
        self._call(self._membership.UndrainOwner, request)

    def stop(self, name: str) -> RunView:
        """Asks all ranks of a run to write a checkpoint and end at the same step."""
        return self._change(self._runs.Stop, run_pb2.StopRequest(name=name))

    def events(self, name: str, *, after: int = 0) -> Iterator[EventView]:
        """Yields a run's events after the event `after`, oldest first."""
        while True:
            request = run_pb2.ListEventsRequest(name=name, after_event_id=after)
            events = self._call(self._runs.ListEvents, request).events
            if not events:
                return
            for each in events:
                yield EventView(event_id=each.event_id, time=each.time.ToDatetime(UTC), kind=each.kind, text=each.text)
            after = events[-1].event_id

    def samples(self, name: str) -> list[MetricSample]:
        """Returns what a run's processes measured: gauges, counters, and of each histogram its sum and count."""
        return samples_of(self._call(self._runs.ListSamples, run_pb2.ListSamplesRequest(name=name)).samples)

    def owners(self, name: str) -> list[OwnerView]:
        """Returns the live owners, as a run's couriers get them."""
        response = self._call(self._membership.GetAssignment, membership_pb2.GetAssignmentRequest(run=name))
        groups = Counter(response.owner_by_group.values())
        return [
            OwnerView(name=owner.owner_id, groups=groups[owner.owner_id], draining=owner.draining)
            for owner in response.owners
        ]

    def watch(
        self,
        name: str,
        *,
        from_revision: int = 0,
        away_seconds: float = 30.0,
        on_away: Callable[[float], None] = lambda _: None,
    ) -> Iterator[RunView]:
        """Yields a run now and at every change: in order, each once, none missing.

        A restarted controller is found again, and the watch continues where it stopped.

        Args:
            name: The run.
            from_revision: The last revision already seen; 0 begins with the run as it is.
            away_seconds: How long the controller may be unreachable.
            on_away: Told again and again for how many seconds it has been, and 0 once it is back; may raise.
        """
        seen = from_revision
        away_since: float | None = None
        while True:
            request = run_pb2.WatchRequest(name=name, from_revision=seen)
            try:
                if away_since is not None:  # a watch alone wouldn't tell that the controller is back before a change
                    known = run_pb2.GetRequest(name=name)
                    self._runs.Get(known, timeout=self._timeout_seconds, metadata=self._metadata)
                    away_since = None
                    on_away(0.0)
                for response in self._runs.Watch(request, timeout=WATCH_SECONDS):
                    seen = response.run.revision
                    yield _run_view(response.run)
            except grpc.RpcError as error:
                code = code_of(error)
                late = code is grpc.StatusCode.DEADLINE_EXCEEDED
                if late and away_since is None:  # of this call, not of the watch
                    continue
                if not late and code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise self._fault(error) from None
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > away_seconds:
                    raise self._fault(error) from None
                on_away(max(time.monotonic() - away_since, 0.001))
                self.close()
                self._open()  # with the certificate and the token of now
            time.sleep(RECONNECT_SECONDS)

    def _change(self, method: Callable[..., Any], request: Any) -> RunView:
        request.request_id = uuid.uuid4().hex
        return _run_view(self._call(method, request).run)

    def _call(self, method: Callable[..., Response], request: object) -> Response:
        try:
            return method(request, timeout=self._timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._fault(error) from None

    def _fault(self, error: grpc.RpcError) -> KfdistError:
        if code_of(error) is grpc.StatusCode.UNAVAILABLE:
            if reason := explain(self.address, self._credentials, server=Role.CONTROLLER):
                return EnvironmentFault(reason)
        remedy = "start one with `kfdist serve`, or give its address with --controller or KFDIST_CONTROL_ADDRESS"
        return fault_of(error, address=self.address, what="controller", remedy=remedy)


def _run_view(run: run_pb2.Run) -> RunView:
    """Returns a run from its message; a state unknown to this version counts as created."""
    return RunView(
        name=run.name,
        state=_STATES.get(run.state, RunState.CREATED),
        revision=run.revision,
        epoch=run.epoch,
        step=run.step,
        total_steps=run.total_steps,
        live_workers=run.live_workers,
        live_owners=run.live_owners,
        created=run.created.ToDatetime(UTC),
        directory=run.directory,
        gauges=dict(run.gauges),
        settings=values_of(run.settings),
        settings_revision=run.settings_revision,
        obeyed_revision=run.obeyed_revision,
        obeyed_step=run.obeyed_step,
        world_size=run.world_size,
        changed=tuple(run.changed),
    )


def finite_or_none(value: float) -> float | None:
    """Returns a value for JSON, which has neither NaN nor infinity."""
    return value if math.isfinite(value) else None
