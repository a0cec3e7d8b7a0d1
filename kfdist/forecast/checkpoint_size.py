"""How large a run's checkpoints get, for who has to find room for them."""

from kfdist.config import Config
from kfdist.config.named_functions import is_own
from kfdist.curvature.auto import MeasuredCosts
from kfdist.curvature.averages import WeightedSums
from kfdist.curvature.footprint import NUMBER_BYTES
from kfdist.curvature.gradient_sums import GradientSums
from kfdist.curvature.inverter import AbstractInverter
from kfdist.forecast.outline import META, Given, make_outline
from kfdist.forecast.rank_memory import bytes_of, optimizer_line
from kfdist.runtime.reduce.gradient_moments import empty_gradient_sums
from kfdist.runtime.reduce.reducer import empty_sums
from kfdist.training.method import plan_of
from kfdist.types import BlockShape


def checkpoint_bytes(config: Config) -> int | None:
    """Estimates one checkpoint: the model, the optimizer, the ranks' statistics, and the inverses in use.

    Returns:
        Bytes; None where the data are the user's own, which would have to be loaded, or the model's size isn't known.

    Raises:
        ConfigError: The model or the method is unknown, or a setting is wrong.
    """
    if is_own(config.data.name):
        return None
    model = make_outline(config, Given()).model
    plan = plan_of(config, model, world_size=config.cluster.workers, costs=MeasuredCosts(rates={}))
    parameters = list(model.parameters())
    optimizer = optimizer_line(config, plan, parameters).bytes
    if optimizer is None:
        return None
    kept = bytes_of([*parameters, *model.buffers()]) + optimizer
    if config.optimizer.average_decay is not None:
        kept += bytes_of(parameters)
    copies = config.cluster.workers if config.checkpoint.statistics == "per-rank" else 1
    statistics = sum(_saved(sums) for sums in empty_sums(plan.groups, META).values())
    inverses = sum(_kept_numbers(group.inverter, block.shape) for group in plan.groups for block in group.blocks)
    moments = sum(_saved(sums) for sums in empty_gradient_sums(plan.groups, META).values())
    return kept + copies * statistics + moments + NUMBER_BYTES * inverses


def _saved(sums: WeightedSums | GradientSums) -> int:
    return bytes_of(sums.state_dict().values())


def _kept_numbers(inverter: AbstractInverter, shape: BlockShape) -> int:
    """Returns how many numbers an inverse has, with what outlives it, such as moments."""
    estimate = inverter.estimate(shape)
    return shape.groups * (estimate.numbers + (estimate.prepared if inverter.produces.keeps_memory else 0))
