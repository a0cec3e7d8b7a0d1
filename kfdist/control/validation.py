"""Checks of what callers send. A refusal names the field, the value and what is allowed."""

import math
import re
from collections.abc import Collection

import grpc

from kfdist.control.run_rules import PHASES
from kfdist.policies.assignment import POLICIES
from kfdist.rpc._generated.kfdist.v1 import inversion_pb2, membership_pb2, run_pb2
from kfdist.rpc.status import Refusal
from kfdist.types import RUN_NAME_PATTERN

NAME = re.compile(RUN_NAME_PATTERN)
"""Names of runs and owners, which become file names and label values."""

NAME_RULE = "1 to 63 letters, digits, '.', '_' and '-', beginning and ending with a letter or digit"

MAX_GROUPS = 20_000
MAX_WORLD_SIZE = 1 << 20
MAX_SAMPLES = 10_000
MAX_OWNERS = 4096
MAX_CONFIG_CHARACTERS = 1 << 20
MAX_TEXT_CHARACTERS = 4096
MAX_REQUEST_ID_CHARACTERS = 128

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_NUMBERS = "a finite number, 0 or more"


def check_create(request: run_pb2.CreateRequest) -> None:
    """Checks a new run.

    Raises:
        Refusal: INVALID_ARGUMENT, as all of this module's functions do.
    """
    check_request_id(request.request_id)
    _check_name("name", request.name)
    _check_text("directory", request.directory, MAX_TEXT_CHARACTERS)
    _check_text("config", request.config, MAX_CONFIG_CHARACTERS, lines=True)
    _check_range("total_steps", request.total_steps, 0, None)


def check_request_id(request_id: str) -> None:
    """Checks the id that every mutation carries."""
    if not request_id:
        raise _refusal("request_id", request_id, "a name unique to this call, such as a random UUID")
    _check_text("request_id", request_id, MAX_REQUEST_ID_CHARACTERS)


def check_damping(request: run_pb2.UpdateSettingsRequest) -> float:
    """Checks and returns the new damping."""
    if not request.HasField("damping"):
        raise _refusal("damping", "not set", "a positive number, and is the only setting")
    if not (math.isfinite(request.damping) and request.damping > 0):
        raise _refusal("damping", request.damping, "a finite number above 0")
    return request.damping


def check_revision(revision: int) -> None:
    """Checks the revision after which a watch begins."""
    _check_range("from_revision", revision, 0, None)


def check_worker(request: membership_pb2.RegisterWorkerRequest) -> None:
    """Checks a rank's registration."""
    _check_name("run", request.run)
    _check_range("epoch", request.epoch, 0, None)
    _check_range("world_size", request.world_size, 1, MAX_WORLD_SIZE)
    _check_range("worker_rank", request.worker_rank, 0, request.world_size - 1)
    _check_text("fingerprint", request.fingerprint, MAX_TEXT_CHARACTERS)
    if request.worker_rank:
        return
    if request.assignment:
        _check_choice("assignment", request.assignment, POLICIES)
    if len(request.groups) > MAX_GROUPS:
        raise _refusal("groups", f"{len(request.groups)} groups", f"at most {MAX_GROUPS}")
    names: set[str] = set()
    for group in request.groups:
        if not group.name or group.name in names:
            raise _refusal("groups", repr(group.name), "a name, not empty and different from all others")
        names.add(group.name)
        _check_text("groups.name", group.name, MAX_TEXT_CHARACTERS)
        _check_range("groups.position", group.position, 0, None)
        if not (math.isfinite(group.cost) and group.cost >= 0):
            raise _refusal(f"groups[{group.name}].cost", group.cost, _NUMBERS)


def check_owner(request: membership_pb2.RegisterOwnerRequest) -> None:
    """Checks an owner's registration."""
    owner = request.owner
    _check_name("owner.owner_id", owner.owner_id)
    check_address(owner)
    _check_text("owner.fingerprint", owner.fingerprint, MAX_TEXT_CHARACTERS)
    _check_range("restarts", request.restarts, 0, None)


def check_address(owner: inversion_pb2.Owner) -> None:
    """Checks the address at which an owner listens."""
    match = _ADDRESS.fullmatch(owner.address)
    if len(owner.address) > 300 or match is None or not 0 < int(match.group(2)) <= 65535:
        raise _refusal("owner.address", repr(owner.address[:300]), "host:port with a port from 1 to 65535")


def check_beat(beat: membership_pb2.WorkerBeat) -> None:
    """Checks a rank's heartbeat."""
    _check_range("worker.step", beat.step, 0, None)
    _check_choice("worker.phase", beat.phase, PHASES)


def _check_name(field: str, value: str) -> None:
    if not NAME.fullmatch(value):
        raise _refusal(field, repr(value[:100]), NAME_RULE)


def _check_text(field: str, value: str, limit: int, *, lines: bool = False) -> None:
    if len(value) > limit:
        raise _refusal(field, f"{len(value)} characters long", f"at most {limit} characters")
    if not lines and any(not character.isprintable() for character in value):
        raise _refusal(field, repr(value[:100]), "printable characters only")


def _check_range(field: str, value: int, low: int, high: int | None) -> None:
    if value < low or (high is not None and value > high):
        raise _refusal(field, value, f"{low} or more" if high is None else f"from {low} to {high}")


def _check_choice(field: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise _refusal(field, repr(value[:100]), "one of " + ", ".join(allowed))


def _refusal(field: str, value: object, allowed: str) -> Refusal:
    return Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"{field} is {value}; it must be {allowed}")
