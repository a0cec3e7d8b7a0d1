"""A courier that can't be started leaves nothing open."""

import errno
import os
import subprocess

import pytest

from kfdist.errors import EnvironmentFault
from kfdist.links.rank.courier_process import CourierProcess
from kfdist.links.socket_messages import CourierSetup
from tests.support.jobs import context


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("where", "name"), [(CourierSetup, "write"), (subprocess, "Popen"), (os, "pidfd_open")])
def test_a_courier_that_cannot_be_started_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str
):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    setup = CourierSetup(address="127.0.0.1:9", rank_pid=os.getpid(), context=context(), credentials=None)
    before = open_files()
    monkeypatch.setattr(where, name, refuse)
    with pytest.raises(EnvironmentFault, match=r"can't start a courier \(.*Too many open files\)"):
        CourierProcess(setup, {})
    assert open_files() == before
