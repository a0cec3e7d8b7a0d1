"""Checks of what callers send; each raises `ConfigError`, for callers INVALID_ARGUMENT, with the field as its path."""

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from kfdist.checks import choice, count, number, suggestion
from kfdist.config import PreconditionerSection
from kfdist.config.findings import config_error
from kfdist.control.control_records import PHASES, OwnerRecord, RunRecord
from kfdist.errors import ConfigError
from kfdist.policies import tuning
from kfdist.policies.assignment import POLICIES
from kfdist.rpc._generated.kfdist.v1 import membership_pb2, run_pb2
from kfdist.types import MAX_RANKS, RUN_NAME_PATTERN, InForce, Value

NAME = re.compile(RUN_NAME_PATTERN)
"""Names of runs and owners, which become file names and label values."""

MAX_GROUPS = 20_000
MAX_SAMPLES = 10_000
MAX_CONFIG_CHARACTERS = 1 << 20
MAX_TEXT_CHARACTERS = 4096
MAX_REQUEST_ID_CHARACTERS = 128
MAX_PROCESS_CHARACTERS = 128

MAX_NAMED_CHARACTERS = 1 << 15
"""Of groups in a request, as JSON: couriers pass them on with the other settings in one message of 64 KiB."""

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


def check_changes(changes: Mapping[str, Value | None], in_force: InForce) -> None:
    """Checks new settings of the method by the configuration's own rules, together with those in force.

    Before the ranks have said what they go by, each is checked for itself, and the ranks check the rest.
    """
    if not changes:
        raise ConfigError(f"nothing is to be changed; give at least one of {', '.join(tuning.NAMES)}", path="settings")
    for name in changes:
        if name in in_force.fixed:
            raise ConfigError(f"can't be changed: {in_force.fixed[name]}", path=name)
    new = {name: value for name, value in changes.items() if value is not None}
    values = {**(in_force.values or _unobtrusive(new)), **new}
    if values.get("adoption") == "asap" and "lag" not in new:
        values.pop("lag", None)
    table: dict[str, Any] = {name: value for name, value in values.items() if name not in tuning.STALENESS}
    table["staleness"] = {name: values[name] or None for name in tuning.STALENESS if name in values}
    try:
        PreconditionerSection.model_validate(table)
    except ValidationError as error:
        found = config_error(error, PreconditionerSection)
        raise found.at(found.path.rpartition(".")[2]) from None
    _check_job_periods(values, changes, in_force.job_periods)


def check_names(names: Iterable[str]) -> None:
    """Checks the names of settings that are to be as configured again."""
    for name in names:
        choice("as_configured", name, tuning.NAMES)


def matching_groups(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns the groups that names or globs stand for, in the order of `known`; none: all of them."""
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            hint = suggestion(pattern, known) or (
                f"; there are {', '.join(known[:20])}" if known else "; none is known"
            )
            raise ConfigError(f"{pattern[:100]!r} matches no group of the run{hint}", path="groups")
    matching = [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if len(matching) == len(known):
        return []
    if sum(len(json.dumps(name)) for name in matching) > MAX_NAMED_CHARACTERS:
        raise ConfigError(
            f"{len(matching)} of the {len(known)} groups of the run match, more names than one message to the ranks "
            "holds; ask for fewer, or, without naming any, for all",
            path="groups",
        )
    return matching


def check_owners_compute_alike(record: RunRecord, owners: Sequence[OwnerRecord]) -> None:
    """Refuses a fixed lag where every owner computes otherwise than the ranks: their jobs would wait for ever."""
    if owners and record.fingerprint and not any(each.fingerprint == record.fingerprint for each in owners):
        theirs = sorted({each.fingerprint for each in owners})
        raise ConfigError(
            f'is "fixed-lag", under which owners must compute as the ranks do, {record.fingerprint!r}, and none of '
            f"them does: {theirs}; give both the same device, threads and library "
            'versions, or stay with "asap"',
            path="adoption",
        )


def _unobtrusive(new: Mapping[str, Value]) -> dict[str, Value]:
    """Returns settings that go with any others, as far as these go together themselves."""
    factor = new.get("factor_period", 1)
    adoption = "fixed-lag" if "lag" in new else "asap"
    return {"factor_period": factor, "inverse_period": new.get("inverse_period", factor), "adoption": adoption}


def _check_job_periods(
    values: Mapping[str, Value], changes: Mapping[str, Value | None], job_periods: Sequence[int]
) -> None:
    factor, inverse = (int(values[name]) for name in tuning.PERIODS)
    for period in job_periods:
        if period % factor or inverse % period:
            path = next((name for name in tuning.PERIODS if name in changes), "inverse_period")
            raise ConfigError(
                f"is {values[path]}; a method of the run has a period of its own, {period}, which must be a multiple "
                f"of factor_period = {factor} and divide inverse_period = {inverse}",
                path=path,
            )


def check_worker(request: membership_pb2.RegisterWorkerRequest) -> None:
    """Checks a rank's registration."""
    _check_name("run", request.run)
    count("epoch", request.epoch, least=0)
    number("world_size", request.world_size, least=1, most=MAX_RANKS)
    number("worker_rank", request.worker_rank, least=0, most=request.world_size - 1)
    _check_text("fingerprint", request.fingerprint, MAX_TEXT_CHARACTERS)
    _check_text("process", request.process, MAX_PROCESS_CHARACTERS)
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
