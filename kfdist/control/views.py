"""Runs and events as the controller's clients see them: plain data, free of gRPC."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from kfdist.control.run_rules import RunState
from kfdist.rpc._generated.kfdist.v1 import run_pb2

_STATES: Mapping[int, RunState] = {run_pb2.RunState.Value(f"RUN_STATE_{state.name}"): state for state in RunState}


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run; the fields are those of the Run message in protos/kfdist/v1/run.proto."""

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

    def to_json(self) -> dict[str, object]:
        """Returns what `--json` prints; a gauge that is no finite number is null, as JSON has no word for it."""
        gauges = {name: value if math.isfinite(value) else None for name, value in self.gauges.items()}
        return {**vars(self), "state": self.state.value, "created": self.created.isoformat(), "gauges": gauges}


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


def run_view(run: run_pb2.Run) -> RunView:
    """Returns a run from its message; a state that this version doesn't know counts as created."""
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
    )


def event_view(event: run_pb2.Event) -> EventView:
    """Returns an event from its message."""
    return EventView(event_id=event.event_id, time=event.time.ToDatetime(UTC), kind=event.kind, text=event.text)
