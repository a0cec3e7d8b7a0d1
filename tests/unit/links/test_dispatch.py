"""What a courier asks of an owner."""

from typing import Any, cast

import pytest

import kfdist
from kfdist.errors import ConfigError
from kfdist.links.courier.dispatch import Dispatcher, _Parcel
from kfdist.links.courier.known_owners import OwnerDirectory
from kfdist.links.socket_messages import CourierSetup, Submit
from kfdist.owner.inversion_service import InversionServicer
from kfdist.telemetry.tracing import Hop, Tracing
from kfdist.types import MAX_DEADLINE_SECONDS
from tests.support.jobs import context


def deaf(*_: object) -> None:
    pass


@pytest.mark.parametrize(("stretch", "milliseconds"), [(1, 30_000_000), (2, 60_000_000), (4, 86_400_000)])
def test_a_deadline_that_is_stretched_stays_one_that_owners_take(stretch: int, milliseconds: int):
    setup = CourierSetup(address="127.0.0.1:7070", rank_pid=1, context=context())
    dispatcher = Dispatcher(setup, OwnerDirectory(), done=deaf, count=deaf, fenced=deaf, tracing=Tracing("courier"))
    submit = Submit(
        ticket=1,
        group="group",
        version=0,
        digest="0" * 64,
        deadline_seconds=30_000.0,
        fingerprint="",
        payload_bytes=1,
        submitted_ns=0,
    )
    header = dispatcher._header(_Parcel(submit=submit, payload=memoryview(b"x"), hop=Hop(), stretch=stretch))
    assert header.deadline_milliseconds == milliseconds
    owner = InversionServicer("owner", cast(Any, None))
    owner.set_fingerprint("any")
    owner._check(header)


def test_a_deadline_that_no_owner_takes_is_refused_where_it_is_given():
    with pytest.raises(ConfigError, match=f"deadline_seconds: .* at most {MAX_DEADLINE_SECONDS}"):
        kfdist.connect("127.0.0.1:7070", deadline_seconds=MAX_DEADLINE_SECONDS + 1)
