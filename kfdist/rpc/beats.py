"""What members and the controller say to each other: the heartbeat stream, and the words of `kfdist.types` in it."""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import grpc
import grpc.aio

from kfdist.policies import tuning
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, run_pb2
from kfdist.rpc._generated.kfdist.v1.membership_pb2_grpc import MembershipServiceStub
from kfdist.types import Desired, GroupSpec, InForce, MetricSample, Obeyed, RunSettings, Value

BEAT_SECONDS = 1.0
"""How often members beat."""

_ANSWER_SECONDS = 10.0


class BeatStream:
    """One stream of heartbeats, as ranks' couriers and owners hold it: a beat out, an answer back."""

    def __init__(self, stub: MembershipServiceStub) -> None:
        """Opens the stream."""
        self._stream: Any = stub.Heartbeat()

    async def beat(
        self, member: membership_pb2.WorkerBeat | membership_pb2.OwnerBeat, samples: Iterable[MetricSample]
    ) -> membership_pb2.HeartbeatResponse:
        """Sends one beat and returns its answer.

        Args:
            member: Who beats, and where it stands.
            samples: What it has measured since the last beat.

        Raises:
            TimeoutError: The controller doesn't answer.
            grpc.aio.AioRpcError: It ended the stream, if only with OK; a new one begins with a registration.
        """
        request = membership_pb2.HeartbeatRequest(
            worker=member if isinstance(member, membership_pb2.WorkerBeat) else None,
            owner=member if isinstance(member, membership_pb2.OwnerBeat) else None,
            samples=sample_messages(samples),
        )
        async with asyncio.timeout(_ANSWER_SECONDS):
            with contextlib.suppress(asyncio.InvalidStateError):  # the stream had ended before; `read` says how
                await self._stream.write(request)
            response = await self._stream.read()
        if not isinstance(response, membership_pb2.HeartbeatResponse):  # gRPC's word for the end
            nothing = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.OK, nothing, nothing, details="the controller ended the stream")
        return response

    def close(self) -> None:
        """Ends the stream."""
        self._stream.cancel()


def sample_messages(samples: Iterable[MetricSample]) -> list[membership_pb2.Sample]:
    """Returns the messages of samples."""
    return [membership_pb2.Sample(**asdict(sample)) for sample in samples]


def samples_of(messages: Iterable[membership_pb2.Sample]) -> list[MetricSample]:
    """Returns samples from their messages, labels in the order of their names."""
    return [
        MetricSample(name=each.name, value=each.value, labels=dict(sorted(each.labels.items()))) for each in messages
    ]


def settings_message(settings: RunSettings) -> membership_pb2.RunSettings:
    """Returns the message of a run's settings."""
    said: dict[str, Any] = {name: value for name, value in settings.changes.items() if value is not None}
    return membership_pb2.RunSettings(
        revision=settings.revision,
        desired=settings.desired,
        checkpoint_serial=settings.checkpoint_serial,
        **said,
        as_configured=[name for name, value in settings.changes.items() if value is None],
        refresh_serial=settings.refresh_serial,
        refresh=settings.refresh,
    )


def settings_of(message: membership_pb2.RunSettings) -> RunSettings:
    """Returns settings from their message; a wish that this version doesn't know counts as running."""
    return RunSettings(
        revision=message.revision,
        desired=Desired(message.desired) if message.desired in set(Desired) else Desired.RUNNING,
        checkpoint_serial=message.checkpoint_serial,
        changes=changes_of(message),
        refresh_serial=message.refresh_serial,
        refresh=tuple(message.refresh),
    )


def changes_of(message: membership_pb2.RunSettings | run_pb2.UpdateSettingsRequest) -> dict[str, Value | None]:
    """Returns the settings of the method that a message changes, by name; None: as configured again."""
    known = {name: None for name in message.as_configured if name in tuning.NAMES}
    return {**known, **values_of(message)}


def in_force_message(in_force: InForce) -> membership_pb2.InForce:
    """Returns the message of what a run goes by."""
    return membership_pb2.InForce(
        values=method_settings_message(in_force.values),
        fixed=in_force.fixed,
        job_periods=in_force.job_periods,
        late_damping=in_force.late_damping,
        obeyed=[membership_pb2.Obeyed(**asdict(each)) for each in in_force.obeyed],
        changed=in_force.changed,
    )


def in_force_of(message: membership_pb2.InForce) -> InForce:
    """Returns from its message what a run goes by."""
    return InForce(
        values=values_of(message.values),
        fixed=dict(message.fixed),
        job_periods=tuple(message.job_periods),
        late_damping=tuple(message.late_damping),
        obeyed=tuple(Obeyed(revision=each.revision, step=each.step, refused=each.refused) for each in message.obeyed),
        changed=tuple(message.changed),
    )


def method_settings_message(values: Mapping[str, Value]) -> membership_pb2.MethodSettings:
    """Returns the message of settings of the method, by name."""
    given: dict[str, Any] = dict(values)
    return membership_pb2.MethodSettings(**given)


def values_of(
    message: membership_pb2.RunSettings | membership_pb2.MethodSettings | run_pb2.UpdateSettingsRequest,
) -> dict[str, Value]:
    """Returns the settings of the method that a message has, by name."""
    return {name: getattr(message, name) for name in tuning.NAMES if message.HasField(name)}


def group_messages(groups: Iterable[GroupSpec]) -> list[membership_pb2.GroupSpec]:
    """Returns the messages of groups. `bytes` isn't sent: only the ranks use it."""
    return [membership_pb2.GroupSpec(name=group.name, cost=group.cost, position=group.position) for group in groups]


def groups_of(messages: Iterable[membership_pb2.GroupSpec]) -> tuple[GroupSpec, ...]:
    """Returns groups for the assignment, with `bytes` 0."""
    return tuple(GroupSpec(name=each.name, cost=each.cost, position=each.position, bytes=0) for each in messages)
