"""Jobs and results as bytes: the one wire format between ranks and whoever inverts (`kfdist.curvature.payload`).

The bytes of a result are a function of the job's bytes, the device and the thread count.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfdist.curvature.inverters import AbstractInverter, Outcome, make_inverter
from kfdist.curvature.inverters.ladder import BlockOutcome as BlockOutcome
from kfdist.curvature.inverters.ladder import invert_with_ladder
from kfdist.curvature.payload import (
    add_tensors,
    check_count,
    check_positive,
    check_seed,
    read_metadata,
    read_payload,
    tensors_under,
    write_payload,
)
from kfdist.curvature.preconditioners import PRECONDITIONERS
from kfdist.curvature.records import PackedRecord, move, pack, unpack
from kfdist.curvature.statistics import STATISTICS, KroneckerFactors
from kfdist.errors import ConfigError
from kfdist.linalg.psd import triangle_size
from kfdist.types import BlockName, BlockShape

NO_STATISTICS = "no statistics: every batch since the start was dropped or absent"
"""Reason of a failure that needed no inversion; see `failure_result`."""

_JOB_ROLES = ("statistics", "previous")
_RESULT_ROLES = ("preconditioner", "state")
_HEADER_BYTES_PER_TENSOR = 256


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What came out of one job.

    Attributes:
        outcomes: One per block of the group.
    """

    outcomes: Mapping[BlockName, BlockOutcome]

    @property
    def failed(self) -> bool:
        """Whether any block failed: a group is adopted as a whole or not at all."""
        return any(outcome.outcome is Outcome.FAILED for outcome in self.outcomes.values())

    @property
    def reason(self) -> str:
        """Why it failed; blocks are named where their reasons differ. Empty if it didn't fail."""
        failed = {n: o.reason for n, o in self.outcomes.items() if o.outcome is Outcome.FAILED}
        if len(set(failed.values())) == 1:
            return next(iter(failed.values()))
        return "; ".join(f"{name}: {reason}" for name, reason in failed.items())


def encode_job(
    *,
    inverter: AbstractInverter,
    factors: Mapping[BlockName, KroneckerFactors | PackedRecord],
    damping: float,
    seeds: Mapping[BlockName, int],
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    threads: int,
) -> bytes:
    """Writes down everything an inversion depends on.

    Args:
        inverter: The method with its settings.
        factors: Reduced statistics by block of the group; those that were packed already travel as they are.
        damping: lambda, finite and positive.
        seeds: One per block.
        previous: State of the last version by block; blocks may be missing.
        threads: CPU threads that whoever runs the job must use, since the last bits depend on it.

    Returns:
        The payload; equal arguments give equal bytes.

    Raises:
        ValueError: A damping or thread count that isn't positive, no block, or a block without a seed.
    """
    check_positive("damping", damping)
    check_count("threads", threads)
    if not factors:
        raise ValueError("a job needs at least one block, got none")
    tensors: dict[str, Tensor] = {}
    blocks: list[dict[str, Any]] = []
    for index, name in enumerate(sorted(factors)):
        if name not in seeds:
            raise ValueError(f"block {name!r} has no seed; seeds are given for {', '.join(sorted(seeds)) or 'none'}")
        given = factors[name]
        record = given if isinstance(given, PackedRecord) else pack(given, STATISTICS)
        add_tensors(tensors, f"{index}/statistics", record.tensors)
        add_tensors(tensors, f"{index}/previous", previous.get(name, {}))
        blocks.append({"name": name, "seed": seeds[name], "statistics": _described(record)})
    metadata = {
        "inverter": {"name": inverter.name, "settings": inverter.settings()},
        "damping": damping,
        "threads": threads,
        "blocks": blocks,
    }
    return write_payload("job", tensors, metadata)


def run_job(payload: bytes, *, device: torch.device | str = "cpu") -> bytes:
    """Does a job. The local link and the owner's child both call this: same bytes in, same bytes out.

    The caller sets the thread count (`job_threads`); this function touches no global state.

    Args:
        payload: What `encode_job` returned.
        device: Where to compute.

    Returns:
        The result, for `decode_result`. A failed inversion is a result too.

    Raises:
        ValueError: The payload is malformed; the message says what is wrong with it.
    """
    metadata, entries, tensors = read_payload(payload, "job", roles=_JOB_ROLES)
    inverter = _inverter_of(metadata)
    damping = check_positive("damping", metadata.get("damping"))
    check_count("threads", metadata.get("threads"))
    results: dict[str, Tensor] = {}
    blocks: list[dict[str, Any]] = []
    for index, entry in enumerate(entries):
        seed = check_seed(entry["name"], entry.get("seed"))
        factors = _record(entry, "statistics", tensors, f"{index}/statistics", STATISTICS)
        previous = {n: t.clone().to(device) for n, t in tensors_under(tensors, f"{index}/previous").items()}
        outcome = invert_with_ladder(inverter, move(factors, device), damping=damping, previous=previous, seed=seed)
        blocks.append(_put_outcome(results, index, entry["name"], outcome))
    return write_payload("result", results, {"blocks": blocks})


def decode_result(payload: bytes, *, device: torch.device | str = "cpu") -> GroupResult:
    """Reads a result.

    Args:
        payload: What `run_job` or `failure_result` returned.
        device: Where its tensors are to lie.

    Raises:
        ValueError: The payload is malformed.
    """
    _, entries, tensors = read_payload(payload, "result", roles=_RESULT_ROLES)
    outcomes: dict[BlockName, BlockOutcome] = {}
    for index, entry in enumerate(entries):
        if entry.get("outcome") not in list(Outcome):
            raise ValueError(f"block {entry['name']!r}: unknown outcome {entry.get('outcome')!r}")
        outcome, preconditioner = Outcome(entry["outcome"]), None
        if outcome is not Outcome.FAILED:
            record = _record(entry, "preconditioner", tensors, f"{index}/preconditioner", PRECONDITIONERS)
            preconditioner = move(record, device)
        outcomes[entry["name"]] = BlockOutcome(
            preconditioner=preconditioner,
            outcome=outcome,
            reason=str(entry.get("reason", "")),
            diagnostics=dict(entry.get("diagnostics", {})),
            state={n: t.clone().to(device) for n, t in tensors_under(tensors, f"{index}/state").items()},
        )
    return GroupResult(outcomes=outcomes)


def failure_result(reasons: Mapping[BlockName, str]) -> bytes:
    """Writes a result in which every block failed without an inversion, such as for want of statistics.

    Args:
        reasons: One sentence per block of the group.
    """
    results: dict[str, Tensor] = {}
    blocks = [
        _put_outcome(results, i, n, BlockOutcome(preconditioner=None, outcome=Outcome.FAILED, reason=reasons[n]))
        for i, n in enumerate(sorted(reasons))
    ]
    return write_payload("result", results, {"blocks": blocks})


def job_threads(payload: bytes) -> int:
    """Returns the number of CPU threads that a job must be run with.

    Raises:
        ValueError: The payload is malformed.
    """
    return check_count("threads", read_metadata(payload, "job").get("threads"))


def job_bytes(shapes: Iterable[BlockShape], *, bytes_per_number: int = 4) -> int:
    """Estimates the size of a job on blocks of these shapes, for the balance of the courier ranks.

    Args:
        shapes: Of the group's blocks.
        bytes_per_number: 4 for float32.
    """
    total = 0
    for shape in shapes:
        numbers = shape.groups * (triangle_size(shape.d_in) + triangle_size(shape.d_out))
        total += numbers * bytes_per_number + 2 * _HEADER_BYTES_PER_TENSOR
    return total


def _put_outcome(tensors: dict[str, Tensor], index: int, name: BlockName, outcome: BlockOutcome) -> dict[str, Any]:
    """Adds the tensors of one block's outcome and returns its entry in the metadata."""
    entry: dict[str, Any] = {
        "name": name,
        "outcome": outcome.outcome.value,
        "reason": outcome.reason,
        "diagnostics": dict(outcome.diagnostics),
    }
    if outcome.preconditioner is not None:
        record = pack(outcome.preconditioner, PRECONDITIONERS)
        add_tensors(tensors, f"{index}/preconditioner", record.tensors)
        entry["preconditioner"] = _described(record)
    add_tensors(tensors, f"{index}/state", outcome.state)
    return entry


def _described(record: PackedRecord) -> dict[str, Any]:
    return {"kind": record.kind, "static": record.static}


def _record(
    entry: Mapping[str, Any], role: str, tensors: Mapping[str, Tensor], prefix: str, table: Mapping[str, type]
) -> Any:
    described = entry.get(role)
    if not isinstance(described, dict) or not isinstance(described.get("static"), dict):
        raise ValueError(f"block {entry['name']!r}: its {role} are not described")
    kind, static = described.get("kind"), described["static"]
    try:
        return unpack(PackedRecord(kind=str(kind), tensors=tensors_under(tensors, prefix), static=static), table)
    except ValueError as error:
        raise ValueError(f"block {entry['name']!r}: {error}") from error


def _inverter_of(metadata: Mapping[str, Any]) -> AbstractInverter:
    described = metadata.get("inverter")
    if not isinstance(described, dict) or not isinstance(described.get("settings"), dict):
        raise ValueError(f"the job's inverter is {described!r}, must have a name and settings")
    try:
        return make_inverter(str(described.get("name")), **described["settings"])
    except ConfigError as error:
        raise ValueError(f"the job's inverter: {error}") from error
