"""Jobs and results as bytes: the one wire format between ranks and whoever inverts (`kfdist.wire.payload`).

The bytes of a result are a function of the job's bytes, the device and the thread count.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kfdist import checks
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Coupling, Outcome
from kfdist.curvature.inverters import PRECONDITIONERS, make_inverter
from kfdist.curvature.ladder import BlockOutcome as BlockOutcome
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.curvature.statistics import STATISTICS, Needs
from kfdist.errors import ConfigError
from kfdist.linalg.psd import triangle_size
from kfdist.types import BlockName, BlockShape
from kfdist.wire.payload import (
    add_tensors,
    content_of,
    read_metadata,
    read_payload,
    tensors_under,
    write_payload,
)
from kfdist.wire.records import PackedRecord, move, pack, unpack

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
    statistics: Mapping[BlockName, Any],
    damping: float,
    seeds: Mapping[BlockName, int],
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    threads: int,
) -> bytes:
    """Writes down everything an inversion depends on.

    Args:
        inverter: The method with its settings.
        statistics: The inverter's `statistic`, reduced, by block of the group in the model's order; a `PackedRecord`
            travels as it is.
        damping: lambda, finite and positive.
        seeds: One per block.
        previous: State of the last version by block; blocks may be missing.
        threads: CPU threads that whoever runs the job must use, since the last bits depend on it.

    Returns:
        The payload; equal arguments give equal bytes.

    Raises:
        ValueError: A damping or thread count that isn't positive, no block, or a block without a seed.
    """
    checks.number("damping", damping, above=0)
    checks.count("threads", threads, least=1)
    if not statistics:
        raise ValueError("a job needs at least one block, got none")
    tensors: dict[str, Tensor] = {}
    blocks: list[dict[str, Any]] = []
    for index, (name, given) in enumerate(statistics.items()):
        if name not in seeds:
            raise ValueError(f"block {name!r} has no seed; seeds are given for {', '.join(sorted(seeds)) or 'none'}")
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


def chain_jobs(jobs: Sequence[bytes]) -> bytes:
    """Makes one job of several of one group: each is done on the state that the one before leaves behind.

    Its result is that of the last one, bit for bit what doing them one by one would give.

    Args:
        jobs: What `encode_job` returned, oldest first; a chain among them is taken apart.
    """
    links = [link for each in jobs for link in _links(each)]
    if len(links) == 1:
        return links[0]
    tensors = {f"{index}/job/bytes": _bytes_tensor(link) for index, link in enumerate(links)}
    return write_payload("chain", tensors, {"blocks": [{"name": str(index)} for index in range(len(links))]})


def job_after(job: bytes, result: bytes) -> bytes:
    """Returns the job with the states that `result` left behind as its blocks' `previous`.

    Args:
        job: What `encode_job` or `chain_jobs` returned.
        result: What `run_job` returned for the group's version before; good or failed.

    Raises:
        ValueError: A payload is malformed.
    """
    first, *rest = _links(job)
    metadata, entries, tensors = read_payload(first, "job", roles=_JOB_ROLES)
    _, done, found = read_payload(result, "result", roles=_RESULT_ROLES)
    place = {entry["name"]: index for index, entry in enumerate(done)}
    kept = {name: tensor for name, tensor in tensors.items() if name.split("/")[1] != "previous"}
    for index, entry in enumerate(entries):
        if entry["name"] in place:
            add_tensors(kept, f"{index}/previous", tensors_under(found, f"{place[entry['name']]}/state"))
    described = {key: value for key, value in metadata.items() if key not in ("format", "content")}
    return chain_jobs([write_payload("job", kept, described), *rest])


def run_job(payload: bytes, *, device: torch.device | str = "cpu") -> bytes:
    """Does a job. The local link and the owner's child both call this: same bytes in, same bytes out.

    The caller sets the thread count (`job_threads`); this function touches no global state.

    Args:
        payload: What `encode_job` or `chain_jobs` returned.
        device: Where to compute.

    Returns:
        The result, for `decode_result`. A failed inversion is a result too.

    Raises:
        ValueError: The payload is malformed; the message says what is wrong with it.
    """
    first, *rest = _links(payload)
    result = _run_link(first, device)
    for link in rest:
        result = _run_link(job_after(link, result), device)
    return result


def _links(payload: bytes) -> list[bytes]:
    """Takes a chain apart; any other job is a chain of one."""
    if content_of(payload) != "chain":
        return [payload]
    _, entries, tensors = read_payload(payload, "chain", roles=("job",))
    try:
        return [tensors[f"{index}/job/bytes"].numpy().tobytes() for index in range(len(entries))]
    except KeyError as error:
        raise ValueError(f"the chain of {len(entries)} jobs lacks {error}") from error


def _run_link(payload: bytes, device: torch.device | str) -> bytes:
    metadata, entries, tensors = read_payload(payload, "job", roles=_JOB_ROLES)
    inverter = _inverter_of(metadata)
    damping = checks.number("damping", metadata.get("damping"), above=0)
    checks.count("threads", metadata.get("threads"), least=1)
    names = [entry["name"] for entry in entries]
    seeds = {
        entry["name"]: checks.count(f"seed of block {entry['name']!r}", entry.get("seed"), least=0) for entry in entries
    }
    statistics, previous = {}, {}
    for index, name in enumerate(names):
        record = _record(entries[index], "statistics", tensors, f"{index}/statistics", STATISTICS)
        if type(record) is not inverter.statistic:
            wanted, found = inverter.statistic.__name__, type(record).__name__
            raise ValueError(f"block {name!r}: {inverter.name} inverts {wanted}, the job has {found}")
        statistics[name] = move(record, device)
        previous[name] = {n: t.clone().to(device) for n, t in tensors_under(tensors, f"{index}/previous").items()}
    units = [names] if inverter.coupling is not Coupling.NONE else [[name] for name in names]
    outcomes: dict[BlockName, BlockOutcome] = {}
    for unit in units:
        outcomes |= invert_group_with_ladder(
            inverter,
            {name: statistics[name] for name in unit},
            damping=damping,
            previous=previous,
            seeds=seeds,
        )
    results: dict[str, Tensor] = {}
    blocks = [_put_outcome(results, index, name, outcomes[name]) for index, name in enumerate(names)]
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


def encode_result(preconditioners: Mapping[BlockName, AbstractPreconditioner]) -> bytes:
    """Writes preconditioners down that ranks made themselves, as a result like any other.

    Args:
        preconditioners: One per block of the group.
    """
    results: dict[str, Tensor] = {}
    blocks = [
        _put_outcome(results, index, name, BlockOutcome(preconditioner=each, outcome=Outcome.DONE))
        for index, (name, each) in enumerate(preconditioners.items())
    ]
    return write_payload("result", results, {"blocks": blocks})


def job_threads(payload: bytes) -> int:
    """Returns the number of CPU threads that a job must be run with.

    Raises:
        ValueError: The payload is malformed.
    """
    return checks.count("threads", read_metadata(_links(payload)[0], "job").get("threads"), least=1)


def job_bytes(needs: Iterable[tuple[BlockShape, Needs]], *, bytes_per_number: int = 4) -> int:
    """Estimates the size of a job on some blocks, for the balance of the courier ranks.

    Args:
        needs: Shape and needs of each of the group's blocks.
        bytes_per_number: 4 for float32.
    """
    total = 0
    for shape, wanted in needs:
        sizes = {"A": triangle_size(shape.d_in), "G": triangle_size(shape.d_out), "a": shape.d_in, "g": shape.d_out}
        numbers = sum(size for name, size in sizes.items() if name in wanted.sums)
        numbers += wanted.increment_rows * sum(sizes[name.lower()] for name in wanted.increments)
        if wanted.samples is not None:
            columns = (wanted.samples.columns or 1) if shape.convolution else 1
            numbers += wanted.samples.examples * columns * (shape.d_in + shape.d_out)
        total += shape.groups * numbers * bytes_per_number + 2 * _HEADER_BYTES_PER_TENSOR
    return total


def _bytes_tensor(payload: bytes) -> Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


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
