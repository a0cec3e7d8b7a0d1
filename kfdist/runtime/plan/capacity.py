"""Whether a plan fits into memory, found out before anything is allocated."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from kfdist.curvature.auto import ORDER
from kfdist.curvature.footprint import NUMBER_BYTES, footprint
from kfdist.curvature.inverters import FIXED, INVERTERS, AbstractInverter
from kfdist.errors import EnvironmentFault
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.system.memory import Memory, available_memory, in_words
from kfdist.types import BlockShape

_NOTHING_FITS = "No method fits: leave the layer out with skip, or take a machine with more memory"

_WIDE = 1 << 31
"""Bytes of a factor from which on it is warned of: of 23,171 outputs, or the 10 GB of a language model's head."""


def memory_of(device: torch.device) -> Memory:
    """Returns what can still be had on a device; memory that torch keeps there for later counts."""
    if device.type != "cuda":
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return Memory(free + kept, f"the memory of {torch.cuda.get_device_name(device)}")


def need_of(groups: Sequence[BlockGroup], *, on_host: bool) -> int:
    """Returns the bytes that a plan takes on a rank: all that is kept, and the largest block's that comes and goes.

    On the host that is its inversion beside the bytes of all inverses, which a state for a checkpoint has. A rank that
    inverts for itself begins further inversions beside one only where memory is free (`LocalLink`).

    Args:
        groups: Of the plan.
        on_host: Whether the statistics are in the host's memory, where they are inverted, too.
    """
    each = [footprint(group.inverter, block.shape) for group in groups for block in group.blocks]
    passing = max((one.folding for one in each), default=0)
    if on_host:
        saving = max((one.inversion for one in each), default=0) + sum(one.encoded for one in each)
        passing = max(passing, saving)
    return sum(one.kept for one in each) + passing


def largest_inversion(groups: Iterable[BlockGroup]) -> int:
    """Returns the bytes of the group inversion that takes most: the job, its dense factors, and the result twice."""
    return max((sum(footprint(g.inverter, block.shape).inversion for block in g.blocks) for g in groups), default=0)


def check_memory(groups: Sequence[BlockGroup], device: torch.device, there_is: Memory) -> None:
    """Refuses a plan that doesn't fit.

    Args:
        groups: Of the plan.
        device: Where the statistics will be.
        there_is: What there is; the same on all ranks.

    Raises:
        EnvironmentFault: It doesn't; names the largest layer, what it takes and a method that fits.
    """
    need = need_of(groups, on_host=device.type == "cpu")
    if need <= there_is.bytes:
        return
    sizes = {block.name: (block.shape, group) for group in groups for block in group.blocks}
    name, (shape, group) = max(sizes.items(), key=lambda item: footprint(item[1][1].inverter, item[1][0]).most)
    found, fixed = footprint(group.inverter, shape), group.inverter.name in FIXED
    whole = "" if len(sizes) == 1 else f"; all {len(sizes)} blocks together need {in_words(need)}"
    raise EnvironmentFault(
        f"layer {name!r} ({shape.d_in} inputs, {shape.d_out} outputs) with {group.inverter.name} needs "
        f"{in_words(found.kept)} for its averages and inverse and {in_words(found.passing)} more "
        f"while they are measured, inverted and saved{whole}; there are {in_words(there_is.bytes)} ({there_is.limit}). "
        f"{_NOTHING_FITS if fixed else _advice(name, shape, need - found.most, there_is.bytes)}"
    )


def wide_factors(groups: Iterable[BlockGroup]) -> str:
    """Says which layers have a dense factor of `_WIDE` bytes or more, for which there may be room; else nothing."""
    found = []
    for group in groups:
        for block in group.blocks:
            sizes = {"A": block.shape.d_in, "G": block.shape.d_out}
            width = max((size for name, size in sizes.items() if name in group.needs[block.name].sums), default=0)
            held = NUMBER_BYTES * width**2
            if held >= _WIDE:
                work = sum(each.flops for each in group.inverter.estimate(block.shape).work)
                found.append(
                    f"{block.name!r} with {group.inverter.name} ({width} x {width}, {in_words(held)} on a rank, half "
                    f"of it in each job, {work / 1e12:.2g} TFLOP an inversion)"
                )
    if not found:
        return ""
    return (
        f"so wide a factor is rarely worth it: {'; '.join(found)}. Leave the layer out with skip, or give it eva, "
        "which has no factors, in a table of methods"
    )


def _advice(name: str, shape: BlockShape, others: int, available: int) -> str:
    room = available - max(0, others)
    for method, candidates in _candidates(shape).items():
        for candidate in candidates:
            most = footprint(candidate, shape).most
            if most <= room and not candidate.refusal({name: shape}):
                smaller = candidate.settings().get("rank")
                rank = f" with rank {smaller}" if smaller != type(candidate)().settings().get("rank") else ""
                return (
                    f"{method}{rank} needs {in_words(most)} there: give it to {name!r} in a table of methods, take "
                    '"auto", or leave the layer out with skip'
                )
    return _NOTHING_FITS


def _candidates(shape: BlockShape) -> Mapping[str, Sequence[AbstractInverter]]:
    """Returns what could take a method's place, from the most faithful; low ranks after the usual one."""
    return {method: [INVERTERS[method](), *INVERTERS[method].candidates(shape)] for method in ORDER}
