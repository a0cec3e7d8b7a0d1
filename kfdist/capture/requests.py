"""What a step asks to be measured of each block, and how much of a batch is looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kfdist import checks
from kfdist.curvature.blocks import Block
from kfdist.errors import ConfigError
from kfdist.types import Fisher

PLAIN_SUMS = frozenset({"A", "G", "a", "g"})
DIAGONAL_SUMS = frozenset({"A_diagonal"})
UNIT_SUMS = frozenset({"F"})
CHAIN_SUMS = frozenset({"A_next", "G_next"})
COARSE_SUMS = frozenset({"a_cross", "g_cross"})
ROWS = frozenset({"A", "G"})

SEED_MASK = (1 << 63) - 1
"""Seeds have 63 bits."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How much of a batch is measured; all estimates stay unbiased.

    With none of these given, a factor is made of as many rows of the batch as 5 % of the layer's own forward and
    backward pays for (`kfdist.curvature.blocks.row_budget`), and of all of them at a block's first update.

    Attributes:
        examples_fraction: Share of the examples, in (0, 1]; all if only others are given.
        positions_fraction: Share of the positions of a convolution or a sequence, in (0, 1]; likewise.
        positions_budget: Most positions of an example, at least 1; None sets no such limit.

    Raises:
        ConfigError: A value is out of range.
    """

    examples_fraction: float | None = None
    positions_fraction: float | None = None
    positions_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("examples_fraction", "positions_fraction"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), above=0, most=1)
        if self.positions_budget is not None:
            checks.count("positions_budget", self.positions_budget, least=1, hint="or None for no limit")

    @property
    def by_cost(self) -> bool:
        """Whether what rows cost says how many are measured."""
        return self == Sampling()

    @property
    def examples(self) -> float:
        """The share of the examples that is asked for."""
        return 1.0 if self.examples_fraction is None else self.examples_fraction

    @property
    def positions(self) -> float:
        """The share of the positions that is asked for."""
        return 1.0 if self.positions_fraction is None else self.positions_fraction


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be measured of one block in one step; the scales are those of `kfdist.curvature.averages`.

    Attributes:
        sums: Of "A", "G" (sums of Omega's and Gamma's terms), "A_diagonal" (of tables), "a", "g" (mean vectors), "F"
            (of units), "A_next", "G_next" (cross factors with the next block of its chain), "a_cross", "g_cross" (sums
            with all blocks of its coarse group).
        rows: Of "A", "G": all rows of the batch, with rows^T rows the factor's sum.
        most_rows: Rows of a factor beyond which a sketch takes their place; None keeps all.
        sketch_size: Rows of that sketch.
        sketch_seed: Of that sketch; ranks need seeds of their own.
        samples: How many examples' rows to keep at most, drawn over all micro-batches of the step; None keeps none.
        sample_rows: The most rows of them to keep, by the positions of the first call; None sets no such limit.
        sample_columns: Columns of an example's gradient to keep in the place of more positions
            (`kfdist.linalg.lowrank`); None keeps all positions.
        samples_pooled: Whether their rows are those that the factors see; see `SampleBudget`.
        whole: Whether all rows enter the sums, whatever they cost.
        seed: For what is drawn, at most 63 bits. Give ranks seeds of their own where their draws should differ.
    """

    sums: frozenset[str] = frozenset({"A", "G"})
    rows: frozenset[str] = frozenset()
    most_rows: int | None = None
    sketch_size: int = 0
    sketch_seed: int = 0
    samples: int | None = None
    sample_rows: int | None = None
    sample_columns: int | None = None
    samples_pooled: bool = False
    whole: bool = False
    seed: int = 0

    @property
    def sums_alone(self) -> bool:
        """Whether nothing is asked for that rows of the same examples have to be in."""
        return not self.rows and not self.sums & (CHAIN_SUMS | COARSE_SUMS)

    def __post_init__(self) -> None:
        for field, allowed in (
            ("sums", PLAIN_SUMS | DIAGONAL_SUMS | UNIT_SUMS | CHAIN_SUMS | COARSE_SUMS),
            ("rows", ROWS),
        ):
            unknown = getattr(self, field) - allowed
            if unknown:
                raise ConfigError(f"{field} has {sorted(unknown)}; allowed are {sorted(allowed)}")
        for field in ("samples", "sample_rows", "sample_columns"):
            if getattr(self, field) is not None:
                checks.count(field, getattr(self, field), least=1, hint="or None")


def check_requests(
    requests: Mapping[str, Request],
    *,
    blocks: Mapping[str, Block],
    chains: Sequence[Sequence[str]],
    coarse: Sequence[Sequence[str]],
    fisher: Fisher,
) -> None:
    """Checks that what is asked can be measured.

    Raises:
        ConfigError: An unknown block, a cross sum without its group, or rows of every class of the exact Fisher.
    """
    for name, request in requests.items():
        if name not in blocks:
            raise ConfigError(f"block {name!r} is not measured here; known are {sorted(blocks)}")
        for sums, groups, what in ((CHAIN_SUMS, chains, "chain"), (COARSE_SUMS, coarse, "coarse group")):
            if not request.sums & sums:
                continue
            group = next((group for group in groups if name in group), None)
            if group is None:
                raise ConfigError(f"block {name!r} is in no {what}, so it has no {sorted(request.sums & sums)}")
            missing = [each for each in group if each not in requests]
            if missing:
                raise ConfigError(f"block {name!r} is armed without {missing} of its {what}; arm all of it together")
        if fisher == "exact" and (request.rows or request.samples):
            raise ConfigError(
                f"block {name!r} wants rows of single examples, which fisher='exact' doesn't have (it sums over all "
                "targets); use fisher='mc' or 'empirical'"
            )
