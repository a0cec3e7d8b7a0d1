"""The method "auto": picks an inverter per block from its dimensions, a budget and measured cost, and says why.

Costs are measured once and broadcast, so that all ranks choose alike; the choice itself is a pure function.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kfdist import checks
from kfdist.curvature.by_width import BY_WIDTH, ByWidth
from kfdist.curvature.footprint import footprint
from kfdist.curvature.inverter import AbstractInverter, Operation, Work
from kfdist.curvature.inverters import INVERTERS, check_settings, make_inverter
from kfdist.curvature.inverters.b_kfac import brand_flops
from kfdist.curvature.inverters.rs_kfac import RsKfac
from kfdist.curvature.spectra import EIGH_FLOPS
from kfdist.errors import ConfigError
from kfdist.linalg.arithmetic import plain_arithmetic
from kfdist.linalg.brand import brand_update
from kfdist.linalg.lowrank import gaussian_sketch, randomized_svd, range_basis
from kfdist.linalg.psd import damped_cholesky_inverse, eigh_descending
from kfdist.system.memory import available_memory, in_words
from kfdist.types import BlockShape

AUTO = "auto"
"""The name that stands for `Auto` where a method is named."""

ORDER = ("kfac-eigen", "kfac", "rs-kfac", "sre-kfac", "b-kfac", "eva")
"""Methods that can be chosen, from the most faithful to the cheapest."""

_MEMORY = "memory"
_SIZES = (64, 512)
_REPEATS = 3


class Rate(NamedTuple):
    """Seconds of an operation as a straight line in its floating-point operations.

    Attributes:
        fixed: Seconds of a call on (almost) nothing.
        per_flop: Seconds per floating-point operation.
    """

    fixed: float
    per_flop: float

    def seconds(self, flops: float) -> float:
        """Returns the estimate for one call."""
        return self.fixed + self.per_flop * flops


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """What the operations of inversions cost on one machine.

    Attributes:
        rates: By operation; an operation without a rate counts as free.
        memory: Bytes that the process that measured could still have; None if it is not known, and counts as enough.
    """

    rates: Mapping[Operation, Rate]
    memory: int | None = None

    def seconds(self, work: Iterable[Work]) -> float:
        """Estimates how long some operations take, one after the other."""
        return sum(self.rates[each.operation].seconds(each.flops) for each in work if each.operation in self.rates)

    def to_json(self) -> dict[str, list[float]]:
        """Returns it as JSON values, to be broadcast."""
        memory = {} if self.memory is None else {_MEMORY: [float(self.memory)]}
        return {operation.value: list(rate) for operation, rate in self.rates.items()} | memory

    @staticmethod
    def from_json(value: Mapping[str, list[float]]) -> "MeasuredCosts":
        """Returns what `to_json` wrote, to the last bit."""
        rates = {Operation(name): Rate(*numbers) for name, numbers in value.items() if name != _MEMORY}
        return MeasuredCosts(rates=rates, memory=int(value[_MEMORY][0]) if _MEMORY in value else None)


def measure_costs() -> MeasuredCosts:
    """Measures this machine's CPU, where inversions are done, with the thread count that is set; takes about 0.3 s.

    Memory is the host's; that of an accelerator is looked at when everything is chosen.
    """

    def rate(operation: Callable[[torch.Tensor], Any], flops: Callable[[int], float]) -> Rate:
        small, large = (_fastest(operation, d) for d in _SIZES)
        few, many = (flops(d) for d in _SIZES)
        per_flop = max(large - small, 0.1 * large) / (many - few)
        return Rate(fixed=max(small - per_flop * few, 0.0), per_flop=per_flop)

    one, sketched = torch.ones((), dtype=torch.float32, device="cpu"), RsKfac(rank=24, oversampling=8)

    def sketch(matrix: torch.Tensor) -> None:
        columns = gaussian_sketch(matrix, 32, seed=0)
        randomized_svd(*range_basis(matrix, columns, power_iterations=sketched.power_iterations))

    def brand(matrix: torch.Tensor) -> None:
        half = matrix.shape[-1] // 8
        vectors = torch.eye(matrix.shape[-1], dtype=torch.float32, device="cpu")[None, :, :half].contiguous()
        brand_update(vectors, torch.ones(1, half, dtype=torch.float32, device="cpu"), matrix[None, :half])

    return MeasuredCosts(
        rates={
            Operation.CHOLESKY: rate(lambda matrix: damped_cholesky_inverse(matrix, one), lambda d: float(d**3)),
            Operation.EIGH: rate(eigh_descending, lambda d: EIGH_FLOPS * d**3),
            Operation.SKETCH: rate(sketch, lambda d: sketched.factor_work(d).flops),
            Operation.BRAND: rate(brand, lambda d: brand_flops(d, d // 4)),
        },
        memory=available_memory().bytes,
    )


def _fastest(operation: Callable[[torch.Tensor], Any], d: int) -> float:
    seconds = []
    with plain_arithmetic(torch.device("cpu")):
        rows = gaussian_sketch(torch.zeros(d, d, dtype=torch.float32, device="cpu"), d, seed=d)
        matrix = rows @ rows.mT / d
        for _ in range(_REPEATS + 1):  # the first one warms up
            start = time.perf_counter()
            operation(matrix)
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Chooses a method per block: the most faithful of those allowed whose inversion fits the budget.

    Small blocks get `kfac-eigen`, whose damping is exact; large ones `rs-kfac` with the largest rank that fits; wide
    linear layers whose dense factors alone would not fit `b-kfac`, which holds none; what is larger still `eva`.

    Attributes:
        seconds_per_inversion: Most seconds that one inversion of a block may take on the machine that was measured.
        bytes_per_block: Most bytes that a block's statistics and inverse may take on each rank.
        allow: The methods to choose from, of `ORDER`.
    """

    seconds_per_inversion: float = 2.0
    bytes_per_block: int = 2**30
    allow: tuple[str, ...] = ("kfac-eigen", "rs-kfac", "b-kfac", "eva")

    def __post_init__(self) -> None:
        object.__setattr__(self, "allow", tuple(self.allow) if isinstance(self.allow, list) else self.allow)
        if not isinstance(self.allow, tuple) or not self.allow or not set(self.allow) <= set(ORDER):
            raise ConfigError(f"{self.allow!r} is not allowed; name some of {', '.join(ORDER)}", path="allow")
        for name in ("seconds_per_inversion", "bytes_per_block"):
            checks.number(name, getattr(self, name), above=0)

    def choose(self, shape: BlockShape, costs: MeasuredCosts) -> tuple[AbstractInverter, str]:
        """Picks the method for one block; equal arguments give an equal choice.

        Args:
            shape: Of the block.
            costs: What inversions cost, the same on all ranks.

        Returns:
            The inverter, and what was chosen over what and why, with numbers. Where nothing fits, what exceeds the
            budget by the smallest factor.
        """
        tried: list[_Candidate] = []
        for inverter in self._candidates(shape):
            candidate = _Candidate.of(inverter, shape, costs)
            if self._excess(candidate, costs) <= 1:
                return inverter, self._explanation(candidate, tried, costs)
            tried.append(candidate)
        if not tried:
            reason = f"none of {', '.join(self.allow)} can invert a block of {shape.d_out} x {shape.d_in}"
            raise ConfigError(f"{reason}; allow others of {', '.join(ORDER)}", path="allow")
        best = min(tried, key=lambda candidate: self._excess(candidate, costs))
        others = [each for each in tried if each is not best]
        return best.inverter, f"{self._explanation(best, others, costs)}; nothing fits, this exceeds the budget least"

    def _candidates(self, shape: BlockShape) -> Iterator[AbstractInverter]:
        for name in (each for each in ORDER if each in self.allow):
            for inverter in INVERTERS[name].candidates(shape):
                if not inverter.refusal({"block": shape}):
                    yield inverter

    def _excess(self, candidate: "_Candidate", costs: MeasuredCosts) -> float:
        of_memory = 0.0 if costs.memory is None else candidate.most_bytes / max(costs.memory, 1)
        return max(candidate.seconds / self.seconds_per_inversion, candidate.bytes / self.bytes_per_block, of_memory)

    def _explanation(self, chosen: "_Candidate", others: list["_Candidate"], costs: MeasuredCosts) -> str:
        words = f"{chosen.label}: {_seconds(chosen.seconds)} and {in_words(chosen.bytes)} of a budget of "
        words += f"{_seconds(self.seconds_per_inversion)} and {in_words(self.bytes_per_block)}"
        # Of a method that was tried with several ranks, the smallest says most.
        last = {each.inverter.name: each for each in others if each.inverter.name != chosen.inverter.name}
        rejected = [f"{each.label} would take {self._too_much(each, costs)}" for each in last.values()]
        return "; ".join([words, *rejected])

    def _too_much(self, candidate: "_Candidate", costs: MeasuredCosts) -> str:
        parts = []
        if candidate.seconds > self.seconds_per_inversion:
            parts.append(_seconds(candidate.seconds))
        if candidate.bytes > self.bytes_per_block:
            parts.append(in_words(candidate.bytes))
        if costs.memory is not None and candidate.most_bytes > costs.memory:
            most = in_words(candidate.most_bytes)
            parts.append(f"at its worst moment {most}, where there are {in_words(costs.memory)}")
        return " and ".join(parts)


class _Candidate(NamedTuple):
    """A method for a block with what it would cost there."""

    inverter: AbstractInverter
    seconds: float
    bytes: int
    most_bytes: int

    @staticmethod
    def of(inverter: AbstractInverter, shape: BlockShape, costs: MeasuredCosts) -> "_Candidate":
        memory = footprint(inverter, shape)
        seconds = shape.groups * costs.seconds(inverter.estimate(shape).work)
        return _Candidate(inverter, seconds, memory.kept, memory.most)

    @property
    def label(self) -> str:
        """The method's name, with the settings that differ from their defaults."""
        default, own = type(self.inverter)().settings(), self.inverter.settings()
        changed = ", ".join(f"{name} {value}" for name, value in own.items() if value != default[name])
        return f"{self.inverter.name} with {changed}" if changed else self.inverter.name


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def make_choice(name: str, /, **settings: Any) -> AbstractInverter | Auto | ByWidth:
    """Makes what a method's name stands for: an inverter, or a chooser of them for "auto" and "by-width".

    Args:
        name: A key of `INVERTERS`, "auto" or "by-width".
        **settings: Fields of the inverter or chooser, which keep their defaults where left out; for "by-width" as
            `ByWidth.by_names` takes them.

    Raises:
        ConfigError: Unknown name or setting, or a value that isn't allowed.
    """
    if name == BY_WIDTH:
        return ByWidth.by_names(**settings)
    if name != AUTO:
        return make_inverter(name, **settings)
    check_settings(name, Auto, settings)
    return Auto(**settings)
