"""Whether a larger batch pays, and how many owners keep inverses fresh: in sentences, for a plan and for a report."""

from collections.abc import Mapping

from kfdist.policies.staleness import oldest

_FAR = 4.0
"""How many times the critical batch a batch is below or above it, for "far"."""


def gain(batch: float, noise_scale: float) -> float:
    """Returns what a step gains of what one on all examples would: 1 / (1 + B_simple / B), arXiv 1812.06162."""
    return 1.0 / (1.0 + noise_scale / batch)


def batch_advice(batch: int, noise_scale: float | None, *, owners: int, inverse_period: int) -> list[str]:
    """Says where a batch stands beside the critical one, and what further machines are better used for past it.

    Args:
        batch: Examples of a step over all ranks.
        noise_scale: The gradient noise scale tr(Sigma) / |G|^2 of a run, a number of examples; None if none is known.
        owners: How many owners there are; 0 where nothing is inverted.
        inverse_period: Steps between two inversions of a block.

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
            *_instead(batch, noise_scale, owners, inverse_period),
        ]
    return sentences


def _instead(batch: int, noise_scale: float, owners: int, inverse_period: int) -> list[str]:
    listed = []
    if owners:
        listed.append(f"- more owners than {owners} (cluster.owners), so that inverses are younger when they are used;")
        listed.append(
            f"- a shorter preconditioner.inverse_period than {inverse_period}, which those owners then keep up with;"
            if inverse_period > 1
            else "- a method that is closer to the full curvature, as inverse_period is 1 already;"
        )
    most = max(1, round(noise_scale))
    listed.append(f"- a smaller batch: {most:,} examples take about {_steps(batch, most, noise_scale)} the steps, each")
    listed[-1] += f" {batch / most:.1f} times cheaper."
    return listed


def _steps(batch: int, smaller: int, noise_scale: float) -> str:
    return f"{gain(batch, noise_scale) / gain(smaller, noise_scale):.1f} times"


def owner_advice(
    owners: int, staleness: Mapping[int, int], bound: int | None, *, inverse_period: int, delay: int
) -> list[str]:
    """Says how many owners keep staleness within a bound.

    Args:
        owners: How many there are.
        staleness: The largest staleness in steps by the number of owners, `owners` among them.
        bound: The configured bound; None if there is none: then what the periods alone allow, half a period late.
        inverse_period: Steps between two inversions of a block.
        delay: Steps from statistics to adoption, of an inversion that takes less than a step.
    """
    least = oldest(inverse_period, delay)
    wanted = bound if bound is not None else least + inverse_period // 2
    words = (
        f"the bound of {wanted}" if bound is not None else f"{wanted} steps, half a period beyond the least, {least}"
    )
    enough = min((count for count, steps in staleness.items() if steps <= wanted), default=None)
    now = f"With {owners} owner{'' if owners == 1 else 's'} staleness reaches {staleness[owners]} steps"
    if enough is None:
        best = min(staleness.values())
        most = min(count for count, steps in staleness.items() if steps == best)
        return [
            f"{now}; no number of owners keeps it within {words}: it is {best} at best, with {most}. Raise "
            "inverse_period, take a cheaper method for the dearest blocks, or give owners more threads."
        ]
    if staleness[owners] > wanted:
        return [f"{now}, above {words}; {enough} owners keep it at {staleness[enough]}: cluster.owners = {enough}."]
    if enough < owners:
        return [f"{now}, within {words}; {enough} would be enough ({staleness[enough]})."]
    return [f"{now}, within {words}."]
