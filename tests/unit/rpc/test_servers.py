"""Servers have room for as many connections as their processes may have files, and some to spare."""

import resource

import pytest

from kfdist.rpc import servers


@pytest.mark.parametrize(
    ("limits", "room", "raised"),
    [
        ((1024, 4096), 4096 - 256, (4096, 4096)),
        ((1024, -1), 8192, (8192 + 256, -1)),
        ((256, 256), 128, None),
        ((1 << 20, 1 << 20), 8192, None),
        ((-1, -1), 8192, None),
    ],
)
def test_connections_leave_files_for_the_rest(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], room: int, raised: tuple[int, int] | None
):
    was = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: was.append(new))
    assert dict(servers.server_options())["grpc.max_allowed_incoming_connections"] == room
    assert [new for new in was if new != limits] == ([] if raised is None else [raised])
