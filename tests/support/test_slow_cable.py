"""The tests' own slow cable delays as it says, and no longer than it is there."""

import subprocess
import sys

from tests.support.hosts import Host, made_hosts

CONNECT = """
import socket, sys, time
begun = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 9), timeout=30)
except ConnectionRefusedError:
    print(time.monotonic() - begun)
"""


def round_trip(here: Host, there: Host) -> float:
    command = ["ip", "netns", "exec", here.namespace, sys.executable, "-c", CONNECT, there.address]
    return float(subprocess.check_output(command, text=True))


def test_a_slow_cable_delays_both_ways():
    with made_hosts("a", "b") as hosts:
        a, b = hosts["a"], hosts["b"]
        with b.slow(seconds=0.2, loss=0.0):
            assert round_trip(a, b) >= 0.4
        assert min(round_trip(a, b) for _ in range(5)) < 0.2
