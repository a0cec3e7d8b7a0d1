"""Converts records to protobuf messages and back."""

from collections.abc import Iterable
from dataclasses import asdict

from google.protobuf.timestamp_pb2 import Timestamp

from kfdist.control.run_rules import OwnerRecord, RunRecord
from kfdist.control.store import EventRecord
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2, run_pb2
from kfdist.types import GroupSpec, MetricSample, RunSettings


def run_message(record: RunRecord) -> run_pb2.Run:
    """Returns the message of a run."""
    return run_pb2.Run(
        name=record.name,
        state=f"RUN_STATE_{record.state.name}",
        revision=record.revision,
        epoch=record.epoch,
        step=record.step,
        total_steps=record.total_steps,
        live_workers=record.live_workers,
        live_owners=record.live_owners,
        created=timestamp(record.created_ns),
        directory=record.directory,
        gauges=dict(record.gauges),
    )


def event_message(event: EventRecord) -> run_pb2.Event:
    """Returns the message of an event."""
    return run_pb2.Event(event_id=event.event_id, time=timestamp(event.time_ns), kind=event.kind, text=event.text)


def settings_message(settings: RunSettings) -> membership_pb2.RunSettings:
    """Returns the message of a run's settings; its fields are those of the dataclass."""
    return membership_pb2.RunSettings(**asdict(settings))


def owner_messages(owners: Iterable[OwnerRecord]) -> list[inversion_pb2.Owner]:
    """Returns the messages of owners, as couriers get them."""
    return [
        inversion_pb2.Owner(owner_id=owner.owner_id, address=owner.address, fingerprint=owner.fingerprint)
        for owner in owners
    ]


def groups_of(groups: Iterable[membership_pb2.GroupSpec]) -> tuple[GroupSpec, ...]:
    """Returns groups for the assignment. `bytes` is 0: only the ranks use it, so it isn't sent."""
    return tuple(GroupSpec(name=group.name, cost=group.cost, position=group.position, bytes=0) for group in groups)


def samples_of(samples: Iterable[membership_pb2.Sample]) -> list[MetricSample]:
    """Returns samples from their messages."""
    return [MetricSample(name=sample.name, value=sample.value, labels=dict(sample.labels)) for sample in samples]


def sample_messages(samples: Iterable[MetricSample]) -> list[membership_pb2.Sample]:
    """Returns the messages of samples."""
    return [membership_pb2.Sample(**asdict(sample)) for sample in samples]


def timestamp(time_ns: int) -> Timestamp:
    """Returns the message of a time in nanoseconds since 1970."""
    made = Timestamp()
    made.FromNanoseconds(time_ns)
    return made
