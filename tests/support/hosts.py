"""Hosts on this machine: network namespaces with names and addresses of their own, on a switch whose cables can be cut.

All hosts see this machine's files, but for /etc/hosts and /etc/resolv.conf, and none sees its network: addresses may be
the same in every test, however many run at a time.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support import slow_cable
from tests.support.commands import Process, process_table

_PREFIX = "kfdist-test"
_NAMESPACES, _FILES = Path("/run/netns"), Path("/etc/netns")
_NUMBERS = itertools.count()
_ENTER = 'hostname "$0" && unset GLOO_SOCKET_IFNAME && exec ip netns exec "$@"'
"""A name of its own: where all hosts have the machine's, which is 127.0.0.1, none of torchrun's agents takes itself for
the one that holds the rendezvous. gloo finds its interface by that name, too, as it does for users."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """One host.

    Attributes:
        name: What it calls itself, and others call it.
        address: Of its one interface.
        namespace: The network namespace that it is.
        switch: The namespace of the switch.
    """

    name: str
    address: str
    namespace: str
    switch: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to write before a command to run it there; it takes no process of its own."""
        return ("unshare", "--uts", "--", "sh", "-c", _ENTER, self.name, self.namespace)

    def processes(self) -> list[Process]:
        """Returns what runs there."""
        table = process_table()
        return [table[pid] for pid in map(int, _ip(f"netns pids {self.namespace}").split()) if pid in table]

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Lets nothing through to the host or from it, silently, as a broken switch does: no side sees its cable go."""
        _ip(f"-n {self.switch} link set dev {self.name} nomaster")
        try:
            yield
        finally:
            _ip(f"-n {self.switch} link set dev {self.name} master bridge")

    @contextlib.contextmanager
    def deaf_to(self, other: "Host") -> Iterator[None]:
        """Sends what is for another host to nobody, silently, as a firewall between the two does; others reach both."""
        entry = f"neigh replace {other.address} lladdr 02:00:00:00:00:99 dev eth0 nud permanent"
        _ip(f"-n {self.namespace} {entry}")
        try:
            yield
        finally:
            _ip(f"-n {self.namespace} neigh del {other.address} dev eth0")

    @contextlib.contextmanager
    def slow(self, *, seconds: float, loss: float) -> Iterator[None]:
        """Delays all that goes to the host or comes from it, each way, and loses a share of the frames."""
        if not Path("/dev/net/tun").exists():
            _give_up("no cable can be slow: there is no /dev/net/tun")
        near, far, between = f"{self.name}-near", f"{self.name}-far", f"{self.name}-slow"
        cable = ["ip", "netns", "exec", self.switch, sys.executable, "-m", slow_cable.__name__, near, far]
        with subprocess.Popen(
            [*cable, str(seconds), str(loss)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            _ip(f"-n {self.switch} link add name {between} type bridge")
            _ip(f"-n {self.switch} link set dev {between} up")
            for end, bridge in ((near, between), (far, "bridge")):
                _ip(f"-n {self.switch} link set dev {end} master {bridge} up")
            _ip(f"-n {self.switch} link set dev {self.name} master {between}")
            try:
                yield
            finally:
                _ip(f"-n {self.switch} link set dev {self.name} master bridge")
                told = json.loads(process.communicate(timeout=30)[0])
                _ip(f"-n {self.switch} link del dev {between}")
        assert told["passed"] and (told["lost"] or not loss), f"the slow cable of {self.name} did nothing: {told}"


@contextlib.contextmanager
def apart(*hosts: Host) -> Iterator[None]:
    """Moves hosts to a switch of their own: they reach each other still, and nobody else, as silently as by `cut`."""
    switch = hosts[0].switch
    _ip(f"-n {switch} link add name apart type bridge")
    _ip(f"-n {switch} link set dev apart up")
    try:
        for host in hosts:
            _ip(f"-n {switch} link set dev {host.name} master apart")
        yield
    finally:
        for host in hosts:
            _ip(f"-n {switch} link set dev {host.name} master bridge")
        _ip(f"-n {switch} link del dev apart")


@contextlib.contextmanager
def made_hosts(*names: str) -> Iterator[Mapping[str, Host]]:
    """Makes hosts of these names, and ends them with all that runs there; skips the test where that can't be done."""
    if obstacle := _obstacle():
        _give_up(f"no hosts can be made: {obstacle}")
    label = f"{_label()}-{next(_NUMBERS)}"
    switch = f"{label}-switch"
    hosts = {
        name: Host(name=name, address=f"10.77.0.{number}", namespace=f"{label}-{name}", switch=switch)
        for number, name in enumerate(names, start=1)
    }
    try:
        _make(switch, hosts)
        yield hosts
    finally:
        for namespace in (*(host.namespace for host in hosts.values()), switch):
            _remove(namespace)


def _give_up(reason: str) -> NoReturn:
    # Where all must have been tested, a skip that nobody sees would be a lie.
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def _make(switch: str, hosts: Mapping[str, Host]) -> None:
    _ip(f"netns add {switch}")
    _ip(f"-n {switch} link add name bridge type bridge")
    _ip(f"-n {switch} link set dev bridge up")
    names = "".join(f"{host.address} {host.name}\n" for host in hosts.values())
    for host in hosts.values():
        files = _FILES / host.namespace
        files.mkdir(parents=True)
        (files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (files / "resolv.conf").touch()
        _ip(f"netns add {host.namespace}")
        _ip(f"-n {switch} link add name {host.name} type veth peer name eth0 netns {host.namespace}")
        _ip(f"-n {switch} link set dev {host.name} master bridge up")
        _ip(f"-n {host.namespace} addr add {host.address}/24 dev eth0")
        for interface in ("lo", "eth0"):
            _ip(f"-n {host.namespace} link set dev {interface} up")


def _remove(namespace: str) -> None:
    """Ends a namespace and every process in it; nothing happens if it was never made."""
    if (_NAMESPACES / namespace).exists():
        for pid in _ip(f"netns pids {namespace}").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip(f"netns del {namespace}")
    shutil.rmtree(_FILES / namespace, ignore_errors=True)


@cache
def _obstacle() -> str:
    """Returns why this process can't make hosts; empty if it can."""
    if os.geteuid() != 0:
        return "that takes root"
    missing = [command for command in ("ip", "unshare", "hostname") if shutil.which(command) is None]
    if missing:
        return f"no command {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    _remove_stale()
    try:
        _ip(f"netns add {_label()}-trial")
    except AssertionError as error:
        return str(error)
    _remove(f"{_label()}-trial")
    return ""


def _label() -> str:
    """Returns the beginning of this process's names; unlike its number, when it started tells it from earlier ones."""
    pid = os.getpid()
    return f"{_PREFIX}-{pid}-{process_table()[pid].started}"


def _remove_stale() -> None:
    """Removes what test sessions that were killed have left."""
    living = {f"{process.pid}-{process.started}" for process in process_table().values()}
    for namespace in {entry.name for place in (_NAMESPACES, _FILES) for entry in place.glob(f"{_PREFIX}-*")}:
        if "-".join(namespace.removeprefix(f"{_PREFIX}-").split("-")[:2]) not in living:
            _remove(namespace)


def _ip(command: str) -> str:
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"`ip {command}`: {done.stderr.strip()}"
    return done.stdout
