"""Whether a larger batch pays, and how many owners keep inverses fresh: in sentences, for a plan and for a report."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from kfdist.policies.staleness import oldest

_FAR = 4.0
"""How many times the critical batch a batch is below or above it, for "far"."""


def gain(batch: float, noise_scale: float) -> float:
    """Returns what a step gains of what one on all examples would: 1 / (1 + B_simple / B), arXiv 1812.06162."""
    return 1.0 / (1.0 + noise_scale / batch)


def shortest_period(preconditioner: Mapping[str, Any], periods: Collection[int]) -> tuple[int, str]:
    """Returns the fewest steps between two inverses of a block, and the key of a configuration that sets them.

    Args:
        preconditioner: The configuration's section as a table.
        periods: The steps between two inverses, of each block; none if that isn't known.
    """
    inverse_period, factor_period = preconditioner.get("inverse_period", 1), preconditioner.get("factor_period", 1)
    period = min([inverse_period, *periods])
    if period == inverse_period:
        return period, "preconditioner.inverse_period"
    keys = _keys_of("basis_period", preconditioner, "preconditioner")
    return period, next(keys, "") if period > factor_period else "preconditioner.factor_period"


def _keys_of(name: str, table: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _keys_of(name, value, f"{path}.{key}")
        elif key == name:
            yield f"{path}.{key}"


def batch_advice(
    batch: int,
    noise_scale: float | None,
    *,
    owners: int,
    period: int,
    period_key: str = "preconditioner.inverse_period",
) -> list[str]:
    """Says where a batch stands beside the critical one, and what further machines are better used for past it.

    Args:
        batch: Examples of a step over all ranks.
        noise_scale: The gradient noise scale tr(Sigma) / |G|^2 of a run, a number of examples; None if none is known.
        owners: How many owners there are; 0 where nothing is inverted.
        period: Fewest steps between two inverses of a block.
        period_key: What sets them (`shortest_period`).

    Returns:
        Sentences; the first one names the critical batch, or says that it isn't known.
    """
    if noise_scale is None:
        return [
            "The critical batch isn't known yet: no gradient noise scale was measured. A run measures it with two "
            "ranks or more, or with data.micro_batches = 2 or more; summary.json has it."
        ]
    saved = 1.0 - gain(batch, noise_scale) / gain(2 * batch, noise_scale)
    sentences = [
        f"The critical batch is about {noise_scale:,.0f} examples (the gradient noise scale; a factor of two is within "
        f"its meaning). At {batch:,} a step gains {gain(batch, noise_scale):.0%} of what one on all examples would."
    ]
    if batch <= noise_scale / _FAR:
        sentences.append(f"Twice the batch saves {saved:.0%} of the steps: more ranks pay.")
    elif batch <= noise_scale:
        sentences.append(f"Twice the batch saves {saved:.0%} of the steps at twice the cost of each.")
    else:
        sentences += [
            f"Past it, twice the batch saves only {saved:.0%} of the steps at twice the cost of each. Instead:",
            *_instead(batch, noise_scale, owners, period, period_key),
        ]
    return sentences


def _instead(batch: int, noise_scale: float, owners: int, period: int, period_key: str) -> list[str]:
    listed = []
    if owners:
        listed.append(f"- more owners than {owners} (cluster.owners), so that inverses are younger when they are used;")
        listed.append(
            f"- a shorter {period_key} than {period}, which those owners then keep up with;"
            if period > 1
            else "- a method that is closer to the full curvature, as every step has a new inverse already;"
        )
    most = max(1, round(noise_scale))
    listed.append(f"- a smaller batch: {most:,} examples take about {_steps(batch, most, noise_scale)} the steps, each")
    listed[-1] += f" {batch / most:.1f} times cheaper."
    return listed


def _steps(batch: int, smaller: int, noise_scale: float) -> str:
    return f"{gain(batch, noise_scale) / gain(smaller, noise_scale):.1f} times"


def owner_advice(
    owners: int, staleness: Mapping[int, Mapping[int, int]], bound: int | None, *, delay: int
) -> list[str]:
    """Says how many owners keep staleness within a bound.

    Args:
        owners: How many there are.
        staleness: By the number of owners, `owners` among them: the largest staleness in steps of the blocks with each
            period, by that period. A period is the steps between two inverses.
        bound: The configured bound; None if there is none: then what a block's period allows, half a period late.
        delay: Steps from statistics to adoption, of an inversion that takes less than a step.
    """
    wanted = {period: _wanted(period, bound, delay) for period in staleness[owners]}

    def beyond(count: int) -> float:
        """Returns how far the worst blocks are beyond what is wanted of them, in periods of theirs."""
        return max((steps - wanted[period]) / period for period, steps in staleness[count].items())

    def worst(count: int) -> int:
        return max(staleness[count], key=lambda period: (staleness[count][period] - wanted[period]) / period)

    def words(period: int) -> str:
        if bound is not None:
            return f"the bound of {bound}"
        return f"{wanted[period]} steps, half a period beyond the least, {oldest(period, delay)}"

    enough = min((count for count in staleness if beyond(count) <= 0), default=None)
    period = worst(owners)
    of = f" of blocks inverted every {period}" if len(wanted) > 1 else ""
    now = f"With {owners} owner{'' if owners == 1 else 's'} staleness reaches {staleness[owners][period]} steps{of}"
    if enough is None:
        best = min(sorted(staleness), key=beyond)
        late = worst(best)
        of = f" of blocks inverted every {late}" if late != period else ""
        return [
            f"{now}; no number of owners keeps it within {words(late)}: it is {staleness[best][late]} at best{of}, "
            f"with {best}. Invert less often, take a cheaper method for the dearest blocks, or give owners more "
            "threads."
        ]
    if beyond(owners) > 0:
        return [
            f"{now}, above {words(period)}; {enough} owners keep it at {staleness[enough][period]}: "
            f"cluster.owners = {enough}."
        ]
    if enough < owners:
        return [f"{now}, within {words(period)}; {enough} would be enough ({staleness[enough][period]})."]
    return [f"{now}, within {words(period)}."]


def _wanted(period: int, bound: int | None, delay: int) -> int:
    return bound if bound is not None else oldest(period, delay) + period // 2
