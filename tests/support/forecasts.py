"""What is foretold of a configuration's memory and bytes, for tests that have a run of it."""

from dataclasses import dataclass

from kfdist.config import Config
from kfdist.forecast.inversion_costs import measure
from kfdist.forecast.outline import Given, make_outline
from kfdist.forecast.rank_memory import rank_lines
from kfdist.forecast.rehearsal import rehearse
from kfdist.forecast.traffic import TrafficForecast
from kfdist.training.method import plan_of


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What a rank holds all the time, and what all ranks send in the steps of the run, by purpose."""

    lasting: int
    sent: dict[str, float]


def foretold(config: Config, *, steps: int) -> Foretold:
    """Forecasts a run of so many steps; all figures must be known."""
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=config.cluster.workers, costs=None)
    rehearsal = rehearse(plan, outline, examples=config.data.batch_size, micro_batches=config.data.micro_batches)
    assert rehearsal.fault == ""
    costs = measure(plan.groups, threads=1, limits=rehearsal.limits)
    lines = rank_lines(config, plan, rehearsal, costs)
    assert all(line.bytes is not None for line in lines)
    sent = {}
    for each in TrafficForecast(config, plan, rehearsal, costs).over(steps):
        assert each.total is not None
        sent[each.purpose] = each.total
    return Foretold(lasting=sum(line.bytes or 0 for line in lines if not line.passing), sent=sent)
