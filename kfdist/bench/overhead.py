"""`kfdist bench overhead`: what a step costs beside plain SGD's, in one process, by turns."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from kfdist import checks
from kfdist.bench.plots import draw_step_times
from kfdist.bench.results import conditions, table
from kfdist.bench.served import served
from kfdist.bench.timings import Cores, gemm_rate, means, percentiles, running_on, spread
from kfdist.bench.trainee import KINDS, PARTS, TimedStep, Trainee
from kfdist.bench.workloads import WORKLOADS
from kfdist.links.link import AbstractLink
from kfdist.links.local import LocalLink
from kfdist.report.drawing import SERIES, drawing
from kfdist.runtime.invert.service import Service
from kfdist.runtime.preconditioner import Preconditioner

INVERSIONS = ("owner", "thread")
"""Who inverts: an owner as it is in a run, with controller and courier, or a thread of this process."""

_WARM = 20
"""Steps of each before those that are timed, or as many as are timed; the first one waits for the first inverses."""

_COUNTED = 12
"""Steps whose operations are counted after the timing; those of them that measure nothing are the usual ones."""


@dataclass(frozen=True, kw_only=True)
class OverheadSettings:
    """What is measured.

    Attributes:
        model: A key of `WORKLOADS`.
        method: The preconditioner's; everything else is its default.
        steps: Timed steps of each of the two.
        segment: Steps of one before it is the other's turn.
        inversions: One of `INVERSIONS`.
        seed: Of parameters and batches.
    """

    model: str = "resnet18"
    method: str = "rs-kfac"
    steps: int = 500
    segment: int = 20
    inversions: str = "owner"
    seed: int = 0

    def __post_init__(self) -> None:
        checks.choice("--model", self.model, WORKLOADS)
        checks.choice("--inversions", self.inversions, INVERSIONS)
        checks.count("--steps", self.steps, least=1)


def measure_overhead(settings: OverheadSettings) -> dict[str, Any]:
    """Trains twice by turns on one thread, and returns what steps took.

    Raises:
        ConfigError: The method doesn't exist or doesn't take the model.
        EnvironmentFault: The service doesn't start.
    """
    workload, cores = WORKLOADS[settings.model], Cores()
    with running_on(cores.training):
        sgd = Trainee(workload, None, settings.seed)
        with running_on(cores.others), _link(settings.inversions) as link:
            # What inverts, and the threads that speak with it, start on the other core.
            kfdist = Trainee(
                workload,
                lambda model: Preconditioner(model, settings.method, lr=workload.lr, link=link),
                settings.seed,
            )
            assert kfdist.preconditioner is not None
            with running_on(cores.training), kfdist.preconditioner:
                found = _alternate({"sgd": sgd, "kfdist": kfdist}, settings)
                staleness = max(kfdist.preconditioner.staleness().values())
                kept = mean_diagnostics(kfdist.preconditioner.diagnostics())
                flops = {"sgd": sgd.flops(1), "kfdist": kfdist.flops(min(_COUNTED, settings.steps))}
        rate = gemm_rate()
    content = {
        "bench": "overhead",
        "config": {
            **asdict(settings),
            "workload": workload.title,
            "cores": {"training": cores.training, "inversions": cores.others},
            "optimizer": f"SGD, lr {workload.lr}, momentum 0.9",
            "preconditioner": "defaults",
        },
        **summary(found, warm_steps(settings.steps)),
        "largest_staleness_at_the_end": staleness,
        "mean_diagnostics_at_the_end": kept,
        "loss_at_the_end": {name: float(each.loss) for name, each in (("sgd", sgd), ("kfdist", kfdist))},
        "flops": flops,
        "gemm_flops_per_second": rate,
    }
    return {**content, "bounds": bounds(content)}


@contextmanager
def _link(inversions: str) -> Iterator[Service | AbstractLink]:
    if inversions == "thread":
        yield LocalLink()
    else:
        with served() as running:
            yield running.service


def mean_diagnostics(by_block: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the means over the blocks of how many eigenpairs are kept, and of the error of directions that allows it.

    Args:
        by_block: As `Preconditioner.diagnostics` has them; blocks without a name don't count for it.
    """
    found = {
        name: [of_block[name] for of_block in by_block.values() if name in of_block]
        for name in ("rank_A", "rank_G", "direction_error")
    }
    return {name: round(sum(values) / len(values), 4) for name, values in found.items() if values}


def warm_steps(steps: int) -> int:
    """Returns how many steps go before those that are timed."""
    return min(_WARM, steps)


def _alternate(trainees: Mapping[str, Trainee], settings: OverheadSettings) -> dict[str, list[TimedStep]]:
    """Lets each train some steps, then the next one: a slow minute of the machine is everybody's."""
    found: dict[str, list[TimedStep]] = {name: [] for name in trainees}
    wanted = warm_steps(settings.steps) + settings.steps
    while any(len(steps) < wanted for steps in found.values()):
        for name, trainee in trainees.items():
            for _ in range(min(settings.segment, wanted - len(found[name]))):
                found[name].append(trainee.step())
    return found


def summary(found: Mapping[str, list[TimedStep]], warm: int) -> dict[str, Any]:
    """Returns what is reported of the steps of "sgd" and "kfdist"; p50, p99, mean and max of the latter stand on top.

    Args:
        found: Their steps, from the first.
        warm: How many of each don't count.
    """
    timed = {name: steps[warm:] for name, steps in found.items()}
    totals = {name: [step.total for step in steps] for name, steps in timed.items()}
    cpu = {name: [step.cpu for step in steps] for name, steps in timed.items()}
    by_name = {
        name: {
            **spread(totals[name]),
            "cpu": spread(cpu[name]),
            "parts": {part: spread([step.seconds[part] for step in steps]) for part in PARTS},
            "percentiles": percentiles(totals[name]),
        }
        for name, steps in timed.items()
    }
    own, sgd = by_name["kfdist"], by_name["sgd"]
    return {
        "mean_ratio_to_sgd": round(own["mean"] / sgd["mean"], 4),
        "p50_ratio_to_sgd": round(own["p50"] / sgd["p50"], 4),
        "cpu_ratio_to_sgd": round(own["cpu"]["mean"] / sgd["cpu"]["mean"], 4),
        **{name: own[name] for name in ("mean", "p50", "p99", "max")},
        "p99_over_p50": {name: round(each["p99"] / each["p50"], 3) for name, each in by_name.items()},
        "cpu_p99_over_p50": {name: round(each["cpu"]["p99"] / each["cpu"]["p50"], 3) for name, each in by_name.items()},
        "share_of_steps_over_1.5_medians": {
            name: round(sum(1e3 * each > 1.5 * by_name[name]["cpu"]["p50"] for each in cpu[name]) / len(cpu[name]), 4)
            for name in by_name
        },
        "by_kind": _by_kind(timed["kfdist"]),
        "first_step_seconds": {name: round(steps[0].total, 3) for name, steps in found.items()},
        **by_name,
        "preconditioner_phases": means([step.phases for step in timed["kfdist"]]),
    }


def _by_kind(steps: Sequence[TimedStep]) -> dict[str, dict[str, float]]:
    """Returns of each kind of step how many there were, and the spread of the training thread's CPU time."""
    kinds = {kind: [step.cpu for step in steps if step.kind == kind] for kind in KINDS}
    return {kind: {"steps": len(found), **spread(found)} for kind, found in kinds.items() if found}


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into words and tables."""
    both = {name: content[name] for name in ("sgd", "kfdist")}
    long = content["share_of_steps_over_1.5_medians"]
    ratio, tail = content["mean_ratio_to_sgd"], content["p99_over_p50"]
    keys = ("mean", "p50", "p99", "max")
    whole = [[name, *(each[key] for key in keys), tail[name]] for name, each in both.items()]
    whole += [
        [f"{name}, CPU", *(each["cpu"][key] for key in keys), content["cpu_p99_over_p50"][name]]
        for name, each in both.items()
    ]
    parts = [[part, *(each["parts"][part]["mean"] for each in both.values())] for part in PARTS]
    phases = [[f"  {phase}", None, mean] for phase, mean in content["preconditioner_phases"].items()]
    middle = content["kfdist"]["cpu"]["p50"]
    kinds = [
        [kind, found["steps"], found["p50"], found["max"], found["max"] / middle]
        for kind, found in content["by_kind"].items()
    ]
    place = PARTS.index("preconditioner") + 1
    flops = {name: sum(each.values()) / 1e9 for name, each in content["flops"].items()}
    rates, least = content["bounds"]["gflops_per_second"], content["bounds"]
    means_of_blocks = ", ".join(f"{name} {mean:g}" for name, mean in content["mean_diagnostics_at_the_end"].items())
    return "\n".join(
        [
            f"{content['config']['workload']}; {content['config']['method']}, inversions by "
            f"{content['config']['inversions']}; {content['config']['steps']} steps each",
            "",
            table(["ms a step", *keys, "p99/p50"], whole),
            "",
            table(["mean ms by part", *both], [*parts[:place], *phases, *parts[place:]]),
            "",
            table(["kfdist's steps, ms of CPU", "steps", "p50", "max", "max/p50 of all"], kinds),
            "",
            f"mean {ratio:.2f} x SGD's, median {content['p50_ratio_to_sgd']:.2f} x, main thread's CPU "
            f"{content['cpu_ratio_to_sgd']:.2f} x; {long['kfdist']:.1%} of kfdist's steps take over 1.5 medians of its "
            f"CPU time, {long['sgd']:.1%} of SGD's",
            f"first step {content['first_step_seconds']['kfdist']:.1f} s; largest staleness at the end "
            f"{content['largest_staleness_at_the_end']} steps",
            f"means over the blocks: {means_of_blocks or 'none'}",
            f"operations of a step in which nothing is due: SGD {flops['sgd']:.3g} GFLOP, kfdist {flops['kfdist']:.3g}",
            f"GFLOP/s: SGD's passes {rates['passes']:.0f}, kfdist's application {rates['application']:.0f}, a product "
            f"of 1024 x 1024 {rates['gemm']:.0f}",
            f"the application's operations take {least['application_ms_at_gemm_rate']:.3g} ms at the product's rate; "
            f"at the rate of SGD's passes a step takes {least['least_ratio_of_passes']:.2f} x theirs, or more",
            conditions(content),
        ]
    )


def bounds(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what operations say of the step, counted where nothing is due.

    Args:
        content: What was measured.

    Returns:
        The rates in GFLOP/s of SGD's forward and backward, of kfdist's application and of a large product; how many
        times SGD's forward and backward these and the application take at the passes' own rate; and milliseconds of
        the application at the product's rate.
    """
    parts, counted = content["sgd"]["parts"], content["flops"]
    passes, application = counted["sgd"]["forward_and_backward"], counted["kfdist"]["preconditioner"]
    gemm = content["gemm_flops_per_second"]

    def rate(operations: int, milliseconds: float) -> float:
        return round(operations / (1e6 * milliseconds), 2) if milliseconds else 0.0

    return {
        "gflops_per_second": {
            "passes": rate(passes, parts["forward"]["mean"] + parts["backward"]["mean"]),
            "application": rate(application, content["preconditioner_phases"].get("precondition", 0.0)),
            "gemm": round(gemm / 1e9, 2),
        },
        "least_ratio_of_passes": round(1 + application / passes, 4),
        "application_ms_at_gemm_rate": round(1e3 * application / gemm, 4),
    }


def plot(content: Mapping[str, Any]) -> str:
    """Draws which share of the steps takes how long, and what the mean step consists of."""
    both = {"SGD": content["sgd"], "kfdist": content["kfdist"]}
    with drawing(4.6, rows=2) as drawn:
        above, below = drawn.axes
        draw_step_times(above, {name: each["percentiles"] for name, each in both.items()})
        left = [0.0] * len(both)
        for number, part in enumerate(PARTS):
            widths = [each["parts"][part]["mean"] for each in both.values()]
            below.barh(list(both), widths, left=left, color=SERIES[number], height=0.6, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        below.invert_yaxis()
        below.grid(visible=False, axis="y")
        below.set_xlabel("mean ms")
        drawn.figure.subplots_adjust(left=0.14, right=0.97, top=0.98, bottom=0.2, hspace=0.35)
        drawn.figure.legend(*below.get_legend_handles_labels(), loc="lower center", ncols=3)
    return drawn.svg
