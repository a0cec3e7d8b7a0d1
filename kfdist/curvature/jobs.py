"""Jobs and results as bytes: the one wire format between ranks and whoever inverts (`kfdist.curvature.payloads`).

The bytes of a result are a function of the job's bytes, the device and the thread count.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfdist import checks
from kfdist.curvature import payloads
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Coupling, Inversion, Outcome
from kfdist.curvature.inverters import FIXED, PRECONDITIONERS, make_inverter
from kfdist.curvature.ladder import invert_group_with_ladder
from kfdist.curvature.payloads import Tree
from kfdist.curvature.statistics import MODES, STATISTICS, Needs
from kfdist.errors import ConfigError
from kfdist.linalg.arithmetic import product_precision
from kfdist.linalg.psd import triangle_size
from kfdist.system.provenance import processor_field
from kfdist.types import MAX_THREADS, BlockName, BlockShape
from kfdist.wire.records import move, to_tree
from kfdist.wire.tree import pack, pack_parts

NO_STATISTICS = "no statistics: every batch since the start was dropped or absent"
"""Reason of a failure that needed no inversion; see `failure_result`."""

_HEADER_BYTES_PER_TENSOR = 256


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """What came out of one job.

    Attributes:
        outcomes: One per block of the group.
    """

    outcomes: Mapping[BlockName, Inversion]

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


# What ranks and inverters call ----------------------------------------------------------------------------------------


def encode_job(
    *,
    inverter: AbstractInverter,
    statistics: Mapping[BlockName, Any],
    damping: float,
    seeds: Mapping[BlockName, int],
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    threads: int,
) -> bytes:
    """Encodes everything that an inversion depends on.

    Args:
        inverter: The method with its settings.
        statistics: The inverter's `statistic`, reduced, by block of the group in the model's order; or its tree, which
            is encoded as it is.
        damping: lambda, finite and positive.
        seeds: One per block.
        previous: State of the last version by block; blocks may be missing.
        threads: How many CPU threads the job must be run with: the last bits depend on it.

    Returns:
        The payload; equal arguments give equal bytes.

    Raises:
        ValueError: A damping or thread count that isn't positive, no block, or a block without a seed.
    """
    return b"".join(
        job_parts(
            inverter=inverter, statistics=statistics, damping=damping, seeds=seeds, previous=previous, threads=threads
        )
    )


def job_parts(
    *,
    inverter: AbstractInverter,
    statistics: Mapping[BlockName, Any],
    damping: float,
    seeds: Mapping[BlockName, int],
    previous: Mapping[BlockName, Mapping[str, Tensor]],
    threads: int,
) -> list[bytes | memoryview]:
    """Returns what `encode_job` does, of the same arguments, in parts: tensors on the CPU aren't copied.

    Raises:
        ValueError: As there.
    """
    checks.number("damping", damping, above=0)
    _check_threads(threads)
    if not statistics:
        raise ValueError("a job needs at least one block, got none")
    blocks = []
    for name, given in statistics.items():
        if name not in seeds:
            raise ValueError(f"block {name!r} has no seed; seeds are given for {', '.join(sorted(seeds)) or 'none'}")
        blocks.append(
            {
                "name": name,
                "seed": seeds[name],
                "statistics": given if isinstance(given, dict) else to_tree(given, STATISTICS),
                "previous": payloads.plain(previous.get(name, {})),
            }
        )
    method = {"name": inverter.name, "settings": inverter.settings()}
    return pack_parts(payloads.make("job", inverter=method, damping=damping, threads=threads, blocks=blocks))


def chain_jobs(jobs: Sequence[bytes]) -> bytes:
    """Joins jobs of one group, oldest first, into one: each runs on the state that the previous one leaves behind.

    The result is the last job's, bit for bit as if they had been run one by one. A chain among `jobs` is taken apart.
    """
    links = [link for each in jobs for link in payloads.links(each)]
    return links[0] if len(links) == 1 else pack(payloads.make("chain", jobs=links))


def job_after(job: bytes, result: bytes) -> bytes:
    """Returns the job with the states in `result` as the `previous` of its blocks.

    Args:
        job: What `encode_job` or `chain_jobs` returned.
        result: What `run_job` returned for the version before, good or failed.

    Raises:
        ValueError: A payload is malformed.
    """
    first, *rest = payloads.links(job)
    return chain_jobs([pack(_after(payloads.read(first, "job"), payloads.read(result, "result"))), *rest])


def run_job(payload: bytes, *, device: torch.device | str = "cpu") -> bytes:
    """Runs a job. The local link and the owner's child both call this: same bytes in, same bytes out.

    The caller sets the thread count (`job_threads`); this function touches no global state.

    Args:
        payload: What `encode_job` or `chain_jobs` returned.
        device: Where to compute.

    Returns:
        The result, for `decode_result`. A failed inversion is a result too.

    Raises:
        ValueError: The payload is malformed; the message says what is wrong with it.
    """
    first, *rest = payloads.links(payload)
    result = _run(payloads.read(first, "job"), device)
    for link in rest:
        result = _run(_after(payloads.read(link, "job"), result), device)
    return pack(result)


def decode_result(payload: bytes, *, device: torch.device | str = "cpu") -> GroupResult:
    """Reads a result.

    Args:
        payload: What `run_job`, `failure_result` or `encode_result` returned.
        device: Where to put the preconditioners' tensors; states stay in host memory.

    Raises:
        ValueError: The payload is malformed.
    """
    blocks = payloads.read(payload, "result")["blocks"]
    return GroupResult(outcomes={block["name"]: _read_outcome(block, device) for block in blocks})


def failure_result(reasons: Mapping[BlockName, str]) -> bytes:
    """Encodes a result in which every block failed without an inversion, for example for lack of statistics."""
    return pack(_result({name: Inversion.failed(reasons[name]) for name in sorted(reasons)}))


def encode_result(
    preconditioners: Mapping[BlockName, AbstractPreconditioner], outcomes: Mapping[BlockName, Inversion] | None = None
) -> bytes:
    """Encodes the preconditioners of a group: the very bytes that they were decoded from.

    Args:
        preconditioners: By block, on any device.
        outcomes: What `decode_result` said of their inversions; none for those that the ranks made themselves, which
            become a result like any other.
    """
    said = outcomes or {}
    made = {name: said.get(name, Inversion(preconditioner=None)) for name in preconditioners}
    return pack(_result({name: replace(one, preconditioner=preconditioners[name]) for name, one in made.items()}))


def job_threads(payload: bytes) -> int:
    """Returns how many CPU threads a job must be run with, without reading its tensors.

    Raises:
        ValueError: The payload is malformed.
    """
    return _check_threads(payloads.read_head(payloads.links(payload)[0], "job").get("threads"))


def job_bytes(needs: Iterable[tuple[BlockShape, Needs]]) -> int:
    """Estimates the size of a job on some blocks in float32, for the balance of the courier ranks.

    Args:
        needs: Shape and needs of each of the group's blocks.
    """
    total = 0
    for shape, wanted in needs:
        sizes = {"A": triangle_size(shape.d_in), "G": triangle_size(shape.d_out), "a": shape.d_in, "g": shape.d_out}
        sizes["A_diagonal"] = shape.d_in
        sizes |= {name: triangle_size(d) for name, d in zip(MODES, shape.dimensions, strict=False)}
        numbers = sum(size for name, size in sizes.items() if name in wanted.sums)
        numbers += wanted.increment_rows * sum(sizes[name.lower()] for name in wanted.increments)
        if wanted.samples is not None:
            columns = (wanted.samples.columns or 1) if shape.convolution else 1
            numbers += wanted.samples.examples * columns * (shape.d_in + shape.d_out)
        total += shape.groups * numbers * torch.float32.itemsize + 2 * _HEADER_BYTES_PER_TENSOR
    return total


def fingerprint(device: torch.device | str, threads: int) -> str:
    """Describes device, CPU capability, thread count and library versions in one line.

    Two processes with equal fingerprints get equal bytes from `run_job`. On a CPU the last bits
    of eigendecompositions, sums and convolution gradients depend on the vector instructions and on the thread count;
    the vendor counts because MKL chooses its kernels by it.

    Args:
        device: Where inversions run.
        threads: CPU threads they run with.

    Returns:
        Fields separated by semicolons, such as
        "cpu;AVX512;vendor=GenuineIntel;threads=1;torch=2.13.0+cpu;build=1f2e3d4c".
    """
    device = torch.device(device)
    fields = [
        device.type,
        torch.backends.cpu.get_cpu_capability(),
        f"vendor={processor_field('vendor_id', 'CPU implementer') or 'unknown'}",
        f"threads={threads}",
        f"torch={torch.__version__}",
        # The same version comes with different BLAS and LAPACK; the build's own description tells them apart.
        f"build={hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:8]}",
        f"matmul={product_precision(device)}",
    ]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fields += [torch.cuda.get_device_name(device), f"sm={major}{minor}", f"cuda={torch.version.cuda}"]
    return ";".join(fields)


# Trees ----------------------------------------------------------------------------------------------------------------


def _run(job: Tree, device: torch.device | str) -> Tree:
    inverter = _inverter_of(job)
    damping = checks.number("damping", job.get("damping"), above=0)
    _check_threads(job.get("threads"))
    statistics, previous, seeds = {}, {}, {}
    for block in job["blocks"]:
        name = block["name"]
        seeds[name] = checks.count(f"seed of block {name!r}", block.get("seed"), least=0)
        record = payloads.record(block, "statistics", STATISTICS)
        if type(record) is not inverter.statistic:
            wanted, found = inverter.statistic.__name__, type(record).__name__
            raise ValueError(f"block {name!r}: {inverter.name} inverts {wanted}, the job has {found}")
        statistics[name] = move(record, device)
        previous[name] = payloads.tensors(block, "previous", device)
    units = [statistics] if inverter.coupling is not Coupling.NONE else [{n: each} for n, each in statistics.items()]
    outcomes: dict[BlockName, Inversion] = {}
    for unit in units:
        outcomes |= invert_group_with_ladder(
            inverter, unit, damping=damping, previous=previous, seeds=seeds, symmetric=True
        )
    return _result(outcomes)


def _after(job: Tree, result: Tree) -> Tree:
    """Returns the job on the states that a result left behind."""
    states = {block["name"]: block.get("state") for block in result["blocks"]}
    return {**job, "blocks": [{**block, "previous": states.get(block["name"], {})} for block in job["blocks"]]}


def _result(outcomes: Mapping[BlockName, Inversion]) -> Tree:
    blocks = [
        {
            "name": name,
            "outcome": outcome.outcome.value,
            "reason": outcome.reason,
            "diagnostics": dict(outcome.diagnostics),
            "preconditioner": outcome.preconditioner and to_tree(outcome.preconditioner, PRECONDITIONERS),
            "state": payloads.plain(outcome.state),
        }
        for name, outcome in outcomes.items()
    ]
    return payloads.make("result", blocks=blocks)


def _check_threads(threads: object) -> int:
    count = checks.count("threads", threads, least=1)
    checks.number("threads", count, least=1, most=MAX_THREADS)
    return count


def _inverter_of(job: Tree) -> AbstractInverter:
    described = job.get("inverter")
    if not isinstance(described, dict) or not isinstance(described.get("settings"), dict):
        raise ValueError(f"the job's inverter is {payloads.shortened(described)}, must have a name and settings")
    fixed = FIXED.get(str(described.get("name")))
    if fixed is not None and not described["settings"]:
        return fixed()
    try:
        return make_inverter(str(described.get("name")), **described["settings"])
    except ConfigError as error:
        raise ValueError(f"the job's inverter: {error}") from error


def _read_outcome(block: Tree, device: torch.device | str) -> Inversion:
    said = block.get("outcome")
    if said not in list(Outcome):
        raise ValueError(f"block {block['name']!r}: unknown outcome {payloads.shortened(said)}")
    outcome, preconditioner = Outcome(said), None
    if outcome is not Outcome.FAILED:
        preconditioner = move(payloads.record(block, "preconditioner", PRECONDITIONERS), device)
    return Inversion(
        preconditioner=preconditioner,
        outcome=outcome,
        reason=str(block.get("reason", "")),
        diagnostics=payloads.numbers(block, "diagnostics"),
        state=payloads.tensors(block, "state", "cpu"),  # what the next job takes along; nothing computes with it here
    )
