"""What the controller remembers of runs, owners and assignments, and what becomes of a run's record.

Records are stored as JSON (`kfdist.control.store`). The rules by which they change are in `run_rules`, `steering`,
`owner_rules` and `dealing`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ConfigDict

from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, run_pb2
from kfdist.rpc.beats import method_settings_message
from kfdist.types import GroupName, GroupSpec, InForce, RunSettings


class RunState(StrEnum):
    """Where a run stands (protos/kfdist/v1/run.proto)."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"
    LOST = "lost"

    @property
    def ended(self) -> bool:
        """Whether only a new start can move the run on."""
        return self in (RunState.STOPPED, RunState.FINISHED, RunState.FAILED)


PHASES: Mapping[str, RunState] = {
    "running": RunState.RUNNING,
    "waiting": RunState.RUNNING,  # a wait that all ranks agreed on needs no action
    "paused": RunState.PAUSED,
    "finished": RunState.FINISHED,
    "stopped": RunState.STOPPED,
    "failed": RunState.FAILED,
}
"""The phases that ranks report, and the state that rank 0's phase gives the run."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """One run.

    Attributes:
        name: Its name.
        directory: Where its files are, shown to users.
        total_steps: Its planned number of steps, 0 if unknown.
        created_ns: When it was made known, nanoseconds since 1970.
        epoch: Its newest start.
        world_size: Ranks of its newest start; 0 before the first one has registered.
        begun: Whether a rank of its newest start has reported.
        state: Where it stands.
        step: The step that rank 0 last reported.
        settings: What users asked of it.
        asked: What of it the ranks haven't obeyed yet: its revision, and a text for users.
        obeyed_revision: The newest revision of the settings that all ranks have taken up.
        obeyed_step: The step at which they did.
        refresh_revision: The revision that last asked for fresh inverses; 0 if none did since the last reset.
        refresh_step: The step at which the ranks last agreed on one, in whatever start; -1 if they haven't, or it was
            lost.
        refreshed: The groups that they agreed on then; none: all.
        in_force: What the ranks go by, as rank 0 last said in this start.
        fingerprint: What the numbers of its ranks depend on.
        live_workers: Ranks alive within the lease.
        live_owners: Owners alive within the lease.
        gauges: Rank 0's gauges by metric name.
        revision: Rises by one at every change of this record.
    """

    # Stored as JSON, which has no word for a loss that is NaN.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    name: str
    directory: str = ""
    total_steps: int = 0
    created_ns: int = 0
    epoch: int = 0
    world_size: int = 0
    begun: bool = False
    state: RunState = RunState.CREATED
    step: int = 0
    settings: RunSettings = RunSettings()
    asked: tuple[tuple[int, str], ...] = ()
    obeyed_revision: int = 0
    obeyed_step: int = 0
    refresh_revision: int = 0
    refresh_step: int = -1
    refreshed: tuple[GroupName, ...] = ()
    in_force: InForce = InForce()
    fingerprint: str = ""
    live_workers: int = 0
    live_owners: int = 0
    gauges: Mapping[str, float] = field(default_factory=dict)
    revision: int = 0

    def message(self) -> run_pb2.Run:
        """Returns the message that users get of it."""
        return run_pb2.Run(
            name=self.name,
            state=f"RUN_STATE_{self.state.name}",
            revision=self.revision,
            epoch=self.epoch,
            step=self.step,
            total_steps=self.total_steps,
            live_workers=self.live_workers,
            live_owners=self.live_owners,
            created=timestamp(self.created_ns),
            directory=self.directory,
            gauges=self.gauges,
            settings=method_settings_message(self.in_force.values) if self.in_force.values else None,
            settings_revision=self.settings.revision,
            obeyed_revision=self.obeyed_revision,
            obeyed_step=self.obeyed_step,
            world_size=self.world_size,
            changed=self.in_force.changed,
        )


@dataclass(frozen=True, kw_only=True)
class OwnerRecord:
    """One owner, as it registered.

    Attributes:
        owner_id: Its name, kept over restarts.
        address: Where its InversionService listens.
        fingerprint: What its numbers depend on.
        restarts: Earlier starts under this name.
        pid: Its process.
        live: Whether it was alive within the lease when this was written.
        draining: Whether it is to get no new jobs.
    """

    owner_id: str
    address: str
    fingerprint: str = ""
    restarts: int = 0
    pid: int = 0
    live: bool = True
    draining: bool = False

    @property
    def takes_jobs(self) -> bool:
        """Whether groups are dealt to it."""
        return self.live and not self.draining

    def message(self) -> inversion_pb2.Owner:
        """Returns the message that members get of it."""
        return inversion_pb2.Owner(
            owner_id=self.owner_id, address=self.address, fingerprint=self.fingerprint, draining=self.draining
        )


@dataclass(frozen=True, kw_only=True)
class AssignmentRecord:
    """Which owner inverts which group of a run.

    Attributes:
        run: The run.
        policy: The rule that deals groups (kfdist.policies.assignment).
        groups: The run's groups, as rank 0 registered them.
        owner_by_group: The owner of each group; empty without owners.
        revision: Rises whenever `owner_by_group` changes.
        seconds: What inversions took, by group, if users wanted the groups dealt by that; else empty.
    """

    run: str
    policy: str = "round_robin"
    groups: tuple[GroupSpec, ...] = ()
    owner_by_group: Mapping[GroupName, str] = field(default_factory=dict)
    revision: int = 0
    seconds: Mapping[GroupName, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a run: a word for programs and a text for users."""

    kind: str
    text: str


@dataclass(frozen=True)
class Change:
    """A run's record after something happened, and the events that tell of it."""

    record: RunRecord
    events: tuple[Event, ...] = ()


def timestamp(time_ns: int) -> Timestamp:
    """Returns the message of a time in nanoseconds since 1970."""
    return Timestamp(seconds=time_ns // 10**9, nanos=time_ns % 10**9)
