"""Checks of what callers send; each raises `ConfigError`, for callers INVALID_ARGUMENT, with the field as its path."""

import re

from kfdist.checks import choice, count, number
from kfdist.control.run_rules import PHASES
from kfdist.errors import ConfigError
from kfdist.policies.assignment import POLICIES
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, run_pb2
from kfdist.types import RUN_NAME_PATTERN

NAME = re.compile(RUN_NAME_PATTERN)
"""Names of runs and owners, which become file names and label values."""

MAX_GROUPS = 20_000
MAX_WORLD_SIZE = 1 << 20
MAX_SAMPLES = 10_000
MAX_OWNERS = 4096
MAX_CONFIG_CHARACTERS = 1 << 20
MAX_TEXT_CHARACTERS = 4096
MAX_REQUEST_ID_CHARACTERS = 128

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


def check_create(request: run_pb2.CreateRequest) -> None:
    """Checks a new run."""
    check_request_id(request.request_id)
    _check_name("name", request.name)
    _check_text("directory", request.directory, MAX_TEXT_CHARACTERS)
    _check_text("config", request.config, MAX_CONFIG_CHARACTERS, lines=True)
    count("total_steps", request.total_steps, least=0)


def check_request_id(request_id: str) -> None:
    """Checks the id that every mutation carries."""
    if not request_id:
        raise _refusal("request_id", request_id, "must be a name unique to this call, such as a random UUID")
    _check_text("request_id", request_id, MAX_REQUEST_ID_CHARACTERS)


def check_damping(request: run_pb2.UpdateSettingsRequest) -> float:
    """Checks and returns the new damping, the only setting."""
    given = request.damping if request.HasField("damping") else None
    return number("damping", given, above=0.0, hint="and is the only setting")


def check_worker(request: membership_pb2.RegisterWorkerRequest) -> None:
    """Checks a rank's registration."""
    _check_name("run", request.run)
    count("epoch", request.epoch, least=0)
    number("world_size", request.world_size, least=1, most=MAX_WORLD_SIZE)
    number("worker_rank", request.worker_rank, least=0, most=request.world_size - 1)
    _check_text("fingerprint", request.fingerprint, MAX_TEXT_CHARACTERS)
    if request.worker_rank:
        return
    if request.assignment:
        choice("assignment", request.assignment, POLICIES)
    number("groups", len(request.groups), least=0, most=MAX_GROUPS, hint="how many there are")
    names: set[str] = set()
    for group in request.groups:
        if not group.name or group.name in names:
            raise _refusal("groups", group.name, "must be a name, not empty and different from all others")
        names.add(group.name)
        _check_text("groups.name", group.name, MAX_TEXT_CHARACTERS)
        count("groups.position", group.position, least=0)
        number(f"groups[{group.name}].cost", group.cost, least=0)


def check_owner(request: membership_pb2.RegisterOwnerRequest) -> None:
    """Checks an owner's registration."""
    owner = request.owner
    _check_name("owner.owner_id", owner.owner_id)
    match = _ADDRESS.fullmatch(owner.address)
    if len(owner.address) > 300 or match is None or not 0 < int(match.group(2)) <= 65535:
        raise _refusal("owner.address", owner.address, "must be host:port with a port from 1 to 65535")
    _check_text("owner.fingerprint", owner.fingerprint, MAX_TEXT_CHARACTERS)
    count("restarts", request.restarts, least=0)


def check_beat(beat: membership_pb2.WorkerBeat) -> None:
    """Checks a rank's heartbeat."""
    count("worker.step", beat.step, least=0)
    choice("worker.phase", beat.phase, PHASES)


def _check_name(field: str, value: str) -> None:
    if not NAME.fullmatch(value):
        rule = "must be 1 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or digit"
        raise _refusal(field, value, rule)


def _check_text(field: str, value: str, limit: int, *, lines: bool = False) -> None:
    if len(value) > limit:
        raise _refusal(field, value, f"has {len(value)} characters, and at most {limit} are taken")
    if not lines and not value.isprintable():
        raise _refusal(field, value, "must have printable characters only")


def _refusal(field: str, value: str, rule: str) -> ConfigError:
    return ConfigError(f"{value[:100]!r} is not allowed; {rule}", path=field)
