"""What a plan says of a rank's memory where ranks hold different things, and of what a checkpoint takes."""

from kfdist.config import load_config
from kfdist.forecast.inversion_costs import measure
from kfdist.forecast.outline import Given, make_outline
from kfdist.forecast.rank_memory import rank_lines
from kfdist.forecast.rehearsal import rehearse
from kfdist.training.method import plan_of


def lines_of(workers: int) -> dict[str, int]:
    method = ["preconditioner.method=b-kfac", "preconditioner.settings={rank=4, oversampling=2}"]
    config = load_config(None, environment={}, overrides=[*method, f"cluster.workers={workers}"])
    outline = make_outline(config, Given())
    plan = plan_of(config, outline.model, world_size=workers, costs=None)
    rehearsal = rehearse(plan, outline, examples=8, micro_batches=1)
    costs = measure(plan.groups, threads=1, limits=rehearsal.limits)
    return {line.what: line.bytes or 0 for line in rank_lines(config, plan, rehearsal, costs)}


def test_results_that_a_rank_ships_from_are_those_of_the_rank_with_most_and_a_checkpoint_has_all() -> None:
    alone, shared = lines_of(1), lines_of(3)
    ships, saved = "results that the next jobs go on from", "inverses as a checkpoint's bytes"
    assert alone[ships] / 3 <= shared[ships] < alone[ships]
    assert alone[saved] == shared[saved] >= alone[ships] > 0
