"""Jobs and results as bytes: the one wire format between ranks and whoever inverts.

Both are safetensors files. Their `__metadata__` has a single entry, a JSON text with sorted keys: several entries would
come out in random order. Tensors are named `INDEX/ROLE/FIELD`, INDEX counting the blocks in the order of their names.
The bytes of a result are a function of the job's bytes, the device and the thread count. Nothing is ever unpickled.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kfdist.curvature.inverters import AbstractInverter, Outcome, make_inverter
from kfdist.curvature.inverters.ladder import BlockOutcome as BlockOutcome
from kfdist.curvature.inverters.ladder import invert_with_ladder
from kfdist.curvature.preconditioners import PRECONDITIONERS
from kfdist.curvature.records import PackedRecord, move, pack, unpack
from kfdist.curvature.statistics import STATISTICS, KroneckerFactors
from kfdist.errors import ConfigError
from kfdist.linalg.psd import triangle_size
from kfdist.types import BlockName, BlockShape

FORMAT = 1
"""Moves with every change that an older reader would misread."""

NO_STATISTICS = "no statistics: every batch since the start was dropped or absent"
"""Reason of a failure that needed no inversion; see `failure_result`."""

_METADATA_KEY = "kfdist"
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
    factors: Mapping[BlockName, KroneckerFactors],
    damping: float,
    seeds: Mapping[BlockName, int],
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    threads: int,
) -> bytes:
    """Writes down everything an inversion depends on.

    Args:
        inverter: The method with its settings.
        factors: Reduced statistics by block of the group.
        damping: lambda, finite and positive.
        seeds: One per block.
        previous: State of the last version by block; blocks may be missing.
        threads: CPU threads that whoever runs the job must use, since the last bits depend on it.

    Returns:
        The payload; equal arguments give equal bytes.

    Raises:
        ValueError: A damping or thread count that isn't positive, no block, or a block without a seed.
    """
    _check_number("damping", damping)
    _check_count("threads", threads)
    if not factors:
        raise ValueError("a job needs at least one block, got none")
    tensors: dict[str, Tensor] = {}
    blocks: list[dict[str, Any]] = []
    for index, name in enumerate(sorted(factors)):
        if name not in seeds:
            raise ValueError(f"block {name!r} has no seed; seeds are given for {', '.join(sorted(seeds)) or 'none'}")
        record = pack(factors[name], STATISTICS)
        _add(tensors, f"{index}/statistics", record.tensors)
        _add(tensors, f"{index}/previous", previous.get(name, {}))
        blocks.append({"name": name, "seed": seeds[name], "statistics": _described(record)})
    metadata = {
        "content": "job",
        "inverter": {"name": inverter.name, "settings": inverter.settings()},
        "damping": damping,
        "threads": threads,
        "blocks": blocks,
    }
    return _write(tensors, metadata)


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
    tensors, metadata = _read(payload, "job")
    inverter = _inverter_of(metadata)
    damping = _check_number("damping", metadata.get("damping"))
    _check_count("threads", metadata.get("threads"))
    results: dict[str, Tensor] = {}
    blocks: list[dict[str, Any]] = []
    for index, entry in enumerate(_blocks_of(metadata, tensors, _JOB_ROLES)):
        seed = entry.get("seed")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"block {entry['name']!r}: seed is {seed!r}, must be a whole number")
        factors = _record(entry, "statistics", tensors, f"{index}/statistics", STATISTICS)
        previous = {n: t.clone().to(device) for n, t in _under(tensors, f"{index}/previous").items()}
        outcome = invert_with_ladder(inverter, move(factors, device), damping=damping, previous=previous, seed=seed)
        blocks.append(_put_outcome(results, index, entry["name"], outcome))
    return _write(results, {"content": "result", "blocks": blocks})


def decode_result(payload: bytes, *, device: torch.device | str = "cpu") -> GroupResult:
    """Reads a result.

    Args:
        payload: What `run_job` or `failure_result` returned.
        device: Where its tensors are to lie.

    Raises:
        ValueError: The payload is malformed.
    """
    tensors, metadata = _read(payload, "result")
    outcomes: dict[BlockName, BlockOutcome] = {}
    for index, entry in enumerate(_blocks_of(metadata, tensors, _RESULT_ROLES)):
        if entry.get("outcome") not in list(Outcome):
            raise ValueError(f"block {entry['name']!r}: unknown outcome {entry.get('outcome')!r}")
        outcome = Outcome._value2member_map_[entry["outcome"]]
        assert isinstance(outcome, Outcome)
        preconditioner = None
        if outcome is not Outcome.FAILED:
            record = _record(entry, "preconditioner", tensors, f"{index}/preconditioner", PRECONDITIONERS)
            preconditioner = move(record, device)
        outcomes[entry["name"]] = BlockOutcome(
            preconditioner=preconditioner,
            outcome=outcome,
            reason=str(entry.get("reason", "")),
            diagnostics=dict(entry.get("diagnostics", {})),
            state={n: t.clone().to(device) for n, t in _under(tensors, f"{index}/state").items()},
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
    return _write(results, {"content": "result", "blocks": blocks})


def job_threads(payload: bytes) -> int:
    """Returns the number of CPU threads that a job must be run with.

    Raises:
        ValueError: The payload is malformed.
    """
    return _check_count("threads", _header(payload, "job").get("threads"))


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
        _add(tensors, f"{index}/preconditioner", record.tensors)
        entry["preconditioner"] = _described(record)
    _add(tensors, f"{index}/state", outcome.state)
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
        return unpack(PackedRecord(kind=str(kind), tensors=_under(tensors, prefix), static=static), table)
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


def _blocks_of(
    metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], roles: Collection[str]
) -> list[dict[str, Any]]:
    """Returns the entries of the blocks, once it is sure that each has a name of its own and each tensor a block."""
    blocks = metadata.get("blocks")
    if not isinstance(blocks, list) or not blocks:
        raise ValueError(f"blocks are {blocks!r}, must be a list with at least one entry")
    names: set[BlockName] = set()
    for entry in blocks:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"a block is described by {entry!r}, must have a name")
        if entry["name"] in names:
            raise ValueError(f"block {entry['name']!r} is in the payload twice")
        names.add(entry["name"])
    claimed = tuple(f"{index}/{role}/" for index in range(len(blocks)) for role in roles)
    stray = sorted(name for name in tensors if not name.startswith(claimed))
    if stray:
        raise ValueError(f"tensors that belong to no block: {', '.join(stray)}")
    return blocks


def _check_number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{what} is {value!r}, must be a finite positive number")
    return float(value)


def _check_count(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} is {value!r}, must be a whole number of at least 1")
    return value


def _add(tensors: dict[str, Tensor], prefix: str, fields: Mapping[str, Tensor]) -> None:
    tensors.update({f"{prefix}/{name}": tensor for name, tensor in fields.items()})


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{prefix}/"): t for n, t in sorted(tensors.items()) if n.startswith(f"{prefix}/")}


def _write(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True, allow_nan=False)
    # Clones: safetensors refuses tensors that share memory, and a method's state may share it with its result.
    data = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    return save(data, metadata={_METADATA_KEY: text})


def _read(payload: bytes, content: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = _header(payload, content)
    try:
        return load(payload), metadata
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"the payload is no safetensors file: {error}") from error


def _header(payload: bytes, content: str) -> dict[str, Any]:
    """Reads the metadata alone: eight bytes of length, then JSON (the safetensors format)."""
    try:
        length = int.from_bytes(payload[:8], "little")
        metadata = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"][_METADATA_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the payload of {len(payload)} bytes is no kfdist {content}: {error!r}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT or metadata.get("content") != content:
        found = {k: metadata.get(k) for k in ("format", "content")} if isinstance(metadata, dict) else metadata
        raise ValueError(f"the payload is {found}, must be a {content} of format {FORMAT}")
    return metadata
