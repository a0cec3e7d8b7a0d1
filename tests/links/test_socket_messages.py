"""What rank and courier say to each other comes as it was said, and what doesn't fit is refused."""

import asyncio
import math
import os
import socket
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfdist.links import socket_messages
from kfdist.links.courier.__main__ import RankSocket
from kfdist.links.link import LinkCounters
from kfdist.links.socket_messages import (
    Beat,
    Bye,
    Counted,
    CourierSetup,
    Done,
    Fenced,
    Hello,
    Message,
    NewSettings,
    Report,
    Submit,
    Taken,
)
from kfdist.types import Desired, InForce, MetricSample, Obeyed, RunSettings
from tests.support.jobs import context

SUBMIT = Submit(
    ticket=7,
    group="a.b",
    version=3,
    digest="d" * 64,
    deadline_seconds=0.1,
    fingerprint="f",
    payload_bytes=9,
    submitted_ns=10**18,
)
EXAMPLES = [
    SUBMIT,
    Beat(step=5, phase="running", samples=(MetricSample(name="x", value=0.25, labels={"block": 'q"ü'}),)),
    Report(
        in_force=InForce(
            values={"damping": 0.5, "lag": 2, "adoption": "fixed-lag"},
            fixed={"kl_clip": "no"},
            job_periods=(4,),
            late_damping=("kfac",),
            obeyed=(Obeyed(revision=3, step=9, refused="why"),),
        )
    ),
    Taken(ticket=7, intact=False, at_ns=10**18),
    Bye(),
    Hello(),
    Done(ticket=7, payload_bytes=4, digest="e" * 64, seconds=0.5, owner="owner-0"),
    NewSettings(
        settings=RunSettings(revision=4, desired=Desired.PAUSED, checkpoint_serial=2, changes={"damping": 1e-3})
    ),
    Fenced(),
    Counted(counters=LinkCounters(resubmissions={"crash": 2}, bytes_sent=5, bytes_received=6, samples_dropped=7)),
]


@pytest.fixture
def pair():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_comes_as_it_was_said(pair, message):
    socket_messages.send(pair[0], socket_messages.encode(message))
    assert socket_messages.receive(pair[1]) == (message, [])


def test_every_kind_has_an_example():
    assert {type(message).__name__ for message in EXAMPLES} == {kind.__name__ for kind in get_args(Message)}


def test_descriptors_come_with_their_message(pair):
    read, write = os.pipe()
    socket_messages.send(pair[0], socket_messages.encode(SUBMIT), [read, write])
    os.close(read)
    os.close(write)
    received = socket_messages.receive(pair[1])
    assert received is not None
    _, (read, write) = received
    assert not os.get_inheritable(read)
    os.write(write, b"through")
    assert os.read(read, 10) == b"through"
    os.close(read)
    os.close(write)


def test_the_other_side_is_gone(pair):
    pair[0].close()
    assert socket_messages.receive(pair[1]) is None


@given(st.binary(max_size=60))
def test_bytes_that_are_no_message(data):
    with pytest.raises(ValueError):
        socket_messages.decode(data)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind":"done"}', "done.ticket: Field required"),
        ('{"kind":"other"}', "tag 'other'"),
        ('{"kind":"bye","more":1}', "bye.more: Unexpected"),
        ('{"kind":"beat","step":1.5,"phase":"running"}', "beat.step: Input should be a valid integer"),
        ('{"kind":"beat","step":1,"phase":"running","samples":[{"name":"x"}]}', "beat.samples.0.value: Field required"),
        ('{"kind":"new_settings","settings":{"desired":"asleep"}}', "new_settings.settings.desired"),
        ("[]", "should be an object"),
        ("3", "should be an object"),
        ("null", "should be an object"),
    ],
)
def test_json_that_is_no_message(text, reason):
    with pytest.raises(ValueError, match=f"no message of this version.*{reason}"):
        socket_messages.decode(text.encode())


def test_a_loss_that_is_no_number_comes_as_it_is():
    samples = tuple(MetricSample(name="kfdist_loss", value=value) for value in (math.nan, math.inf, -math.inf))
    beat = socket_messages.decode(socket_messages.encode(Beat(step=0, phase="running", samples=samples)))
    assert isinstance(beat, Beat)
    assert repr(beat.samples) == repr(samples)


def test_a_message_over_the_limit_is_refused():
    beat = Beat(
        step=0, phase="running", samples=(MetricSample(name="x" * socket_messages.MAX_MESSAGE_BYTES, value=0.0),)
    )
    with pytest.raises(ValueError, match="at most 65536 fit"):
        socket_messages.encode(beat)


@given(st.integers(0, 300))
def test_beats_are_split_and_complete(count):
    samples = [
        MetricSample(name="kfdist_staleness_steps", value=i, labels={"block": "layer." * 60}) for i in range(count)
    ]
    parts = list(socket_messages.beats(3, "running", samples))
    assert len(parts) == max(1, -(-count // socket_messages.SAMPLES_PER_MESSAGE))
    assert [sample for part in parts for sample in part.samples] == samples
    assert all(len(socket_messages.encode(part)) <= socket_messages.MAX_MESSAGE_BYTES for part in parts)


def test_the_setup_of_a_large_run_goes_through_a_memfd():
    groups = {f"encoder.layers.{i}.attention": float(i) for i in range(3000)}
    setup = CourierSetup(address="127.0.0.1:1", rank_pid=4, context=context(rank=3, world_size=4, groups=groups))
    descriptor = setup.write()
    read = CourierSetup.read(descriptor)
    os.close(descriptor)
    assert list(read.context.groups) == list(setup.context.groups)
    assert (read.address, read.rank_pid, read.context.worker_rank) == ("127.0.0.1:1", 4, 3)


def test_settings_that_name_too_many_groups_come_as_for_all(pair):
    async def tell() -> None:
        names = tuple(f"model.layers.{i}.attention.projection" for i in range(2000))
        RankSocket(pair[0]).tell_settings(RunSettings(revision=3, desired=Desired.STOPPED, refresh=names))

    asyncio.run(tell())
    received = socket_messages.receive(pair[1])
    assert received is not None
    assert received[0] == NewSettings(settings=RunSettings(revision=3, desired=Desired.STOPPED))
