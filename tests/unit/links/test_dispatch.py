"""What a courier asks of an owner."""

import asyncio
import re
from typing import Any, cast

import pytest

import kfdist
from kfdist.errors import ConfigError
from kfdist.links.courier.dispatch import Dispatcher, _Parcel
from kfdist.links.courier.known_owners import KnownOwner, OwnerDirectory
from kfdist.links.socket_messages import CourierSetup, Submit
from kfdist.owner.inversion_service import InversionServicer
from kfdist.telemetry.tracing import Hop, Tracing
from kfdist.types import MAX_DEADLINE_SECONDS
from tests.support.jobs import context


def deaf(*_: object) -> None:
    pass


def submitted() -> Submit:
    return Submit(
        ticket=1,
        group="group",
        version=0,
        digest="0" * 64,
        deadline_seconds=30_000.0,
        fingerprint="",
        payload_bytes=1,
        submitted_ns=0,
    )


@pytest.mark.parametrize(("stretch", "milliseconds"), [(1, 30_000_000), (2, 60_000_000), (4, 86_400_000)])
def test_a_deadline_that_is_stretched_stays_one_that_owners_take(stretch: int, milliseconds: int):
    setup = CourierSetup(address="127.0.0.1:7070", rank_pid=1, context=context())
    dispatcher = Dispatcher(setup, OwnerDirectory(), done=deaf, count=deaf, fenced=deaf, tracing=Tracing("courier"))
    header = dispatcher._header(_Parcel(submit=submitted(), payload=memoryview(b"x"), hop=Hop(), stretch=stretch))
    assert header.deadline_milliseconds == milliseconds
    owner = InversionServicer("owner", cast(Any, None))
    owner.set_fingerprint("any")
    owner._check(header)


def test_a_deadline_that_no_owner_takes_is_refused_where_it_is_given():
    with pytest.raises(ConfigError, match=f"deadline_seconds: .* at most {MAX_DEADLINE_SECONDS}"):
        kfdist.connect("127.0.0.1:7070", deadline_seconds=MAX_DEADLINE_SECONDS + 1)


def test_a_job_that_all_owners_failed_rests_until_one_of_them_comes_back():
    owner, directory = KnownOwner(owner_id="owner-0", address="127.0.0.1:1"), OwnerDirectory()
    directory.update([owner])

    async def choose() -> tuple[bool, KnownOwner]:
        setup = CourierSetup(address="127.0.0.1:7070", rank_pid=1, context=context())
        dispatcher = Dispatcher(setup, directory, done=deaf, count=deaf, fenced=deaf, tracing=Tracing("courier"))
        parcel = _Parcel(submit=submitted(), payload=memoryview(b"x"), hop=Hop(), tried={"owner-0"}, rounds=16)
        choosing = asyncio.create_task(dispatcher._choose(parcel))
        for lists in ([owner], []):  # a controller tells them every second
            await asyncio.sleep(0.05)
            directory.update(lists)
            dispatcher.owners_changed()
        await asyncio.sleep(0.05)
        rests = not choosing.done()
        directory.update([owner])
        dispatcher.owners_changed()
        return rests, await asyncio.wait_for(choosing, timeout=2.0)  # and not after five seconds

    assert asyncio.run(choose()) == (True, owner)


@pytest.mark.parametrize(
    ("unheard", "words"),
    [(False, r"\(is the pool running\?\)"), (True, r"\(no controller answers at 127.0.0.1:7070, .*kfdist serve.*\)")],
)
def test_jobs_that_wait_for_a_first_owner_say_who_is_missing(caplog, unheard: bool, words: str):
    """A library user who names a wrong address waits at the first step, and was asked whether the pool runs."""
    setup = CourierSetup(address="127.0.0.1:7070", rank_pid=1, context=context())
    dispatcher = Dispatcher(
        setup,
        OwnerDirectory(),
        done=deaf,
        count=deaf,
        fenced=deaf,
        tracing=Tracing("courier"),
        controller_is_unheard=lambda: unheard,
    )
    parcel = _Parcel(submit=submitted(), payload=memoryview(b"x"), hop=Hop())
    dispatcher._explain_waiting(parcel)
    assert caplog.text == "", "ranks and pool start together"
    dispatcher._begun -= 60
    dispatcher._explain_waiting(parcel)
    assert re.search(f"no owner is known yet; jobs wait for one {words}", caplog.text)
