"""`kfdist bench scale`: what a run of thousands of ranks would take, from a model whose assumptions are told.

Counted, not measured, are the bytes: by `kfdist plan`'s forecast, with the run's own schedule, shapes and protocol.
Measured here are the seconds of inversions, and what the rank's agreement takes on the host at each step.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kfdist import checks
from kfdist.bench.on_the_wire import PURPOSES
from kfdist.bench.results import conditions, table
from kfdist.config import Config, load_config
from kfdist.errors import ConfigError
from kfdist.forecast.forecast import Forecast, make_forecast
from kfdist.forecast.inversion_costs import Costs
from kfdist.forecast.outline import Given
from kfdist.policies.adoption import AdoptionLedger, encode_table
from kfdist.report.drawing import SERIES, drawing, plain_powers
from kfdist.rpc.beats import BEAT_SECONDS


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """What is calculated, and on which assumptions.

    Attributes:
        config: A recipe or a configuration file.
        ranks: How many, rising.
        owners: How many, rising.
        step_seconds: Of a training step without kfdist.
        gigabytes_a_second: That a rank sends on the training's network.
        hop_microseconds: From one rank to the next.
    """

    config: str = "imagenet-resnet50"
    ranks: tuple[int, ...] = (8, 64, 512, 4096)
    owners: tuple[int, ...] = (1, 4, 16, 64, 256)
    step_seconds: float = 0.3
    gigabytes_a_second: float = 25.0
    hop_microseconds: float = 5.0

    def __post_init__(self) -> None:
        for name in ("step_seconds", "gigabytes_a_second", "hop_microseconds"):
            checks.number(f"--{name.replace('_', '-')}", getattr(self, name), above=0)
        for name in ("ranks", "owners"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ConfigError(f"is {list(getattr(self, name))!r}; numbers from 1 are needed", path=f"--{name}")

    def assumptions(self) -> list[str]:
        """Says in sentences what the figures rest on."""
        return [
            f"a step without kfdist takes {self.step_seconds:g} s, whatever the ranks",
            f"each rank sends {self.gigabytes_a_second:g} GB/s, and a hop takes {self.hop_microseconds:g} us; nobody "
            "else uses the network",
            "a rank sends 2 (W - 1) / W of the bytes that are reduced, as on a ring, and a reduction has 2 log2 W "
            "hops, as a tree; NCCL has double trees that do both",
            "a snapshot goes from its courier rank to all others, pipelined: each rank passes it on once",
            "nothing of this is hidden behind the backward or the forward: seconds a step are the most that it costs",
            "inversions take what they take on this CPU; each owner does one at a time, and none fails",
            "bytes are those of plan's forecast: all eigenpairs that may be kept are, and every inversion is adopted",
        ]


def measure_scale(settings: ScaleSettings) -> dict[str, Any]:
    """Calculates traffic for every number of ranks, and staleness for every number of owners.

    Raises:
        ConfigError: The configuration is wrong.
    """
    by_ranks, forecast, costs = [], None, None
    for ranks in settings.ranks:
        forecast = _forecast(settings, ranks, settings.owners[-1], costs)
        costs = forecast.costs  # measured once, so that a slow moment of the machine is everybody's
        by_ranks.append(_of_ranks(settings, forecast, ranks))
    by_owners = []
    for owners in settings.owners:
        forecast = _forecast(settings, settings.ranks[-1], owners, costs)
        by_owners.append({"owners": owners, **_of_owners(forecast)})
    assert forecast is not None
    blocks = sum(block.owner is not None for block in forecast.blocks)
    return {
        "bench": "scale",
        "config": {
            **asdict(settings),
            "run": forecast.title,
            "owner_threads": forecast.threads,
            "assumptions": [*settings.assumptions(), *forecast.remarks],
        },
        "by_ranks": by_ranks,
        "by_owners": by_owners,
        "seconds_of_inversions_in_a_period": round(sum(forecast.by_method.values()), 3),
        "controller_beats_a_second": {str(ranks): round(ranks / BEAT_SECONDS) for ranks in settings.ranks},
        "host_seconds_to_encode_a_table": table_seconds(blocks),
    }


def _forecast(settings: ScaleSettings, ranks: int, owners: int, costs: Costs | None) -> Forecast:
    config = _config(settings, ranks, owners)
    return make_forecast(config, Given(), step_seconds=settings.step_seconds, costs=costs)


def _config(settings: ScaleSettings, ranks: int, owners: int) -> Config:
    given = [f"cluster.workers={ranks}", f"cluster.owners={owners}"]
    return load_config(Path(settings.config), environment={}, overrides=given)


def _of_ranks(settings: ScaleSettings, forecast: Forecast, ranks: int) -> dict[str, Any]:
    """Returns what the ranks send: bytes by purpose, and seconds at the assumed speed."""
    wire = {each.purpose: each.wire or 0.0 for each in forecast.traffic}
    kfdist = sum(wire[purpose] for purpose in PURPOSES)
    # In a period, each group's statistics are reduced and its snapshot is broadcast; the table is reduced at each step.
    period = _config(settings, ranks, 1).preconditioner.inverse_period
    seconds = network_seconds(settings, kfdist, 1.0 + 2.0 * len(forecast.blocks) / period, ranks)
    return {
        "ranks": ranks,
        "gradient_bytes_of_a_rank": wire["gradients"],
        "kfdist_bytes_of_a_rank": {purpose: wire[purpose] for purpose in PURPOSES},
        "share_of_gradient": round(kfdist / wire["gradients"], 5) if wire["gradients"] else None,
        "seconds_a_step": seconds,
        "share_of_step": round(seconds / settings.step_seconds, 5),
    }


def network_seconds(settings: ScaleSettings, size: float, collectives: float, ranks: int) -> float:
    """Returns the seconds of a step's collectives.

    Args:
        settings: Speed and latency.
        size: Bytes that a rank sends in all of them.
        collectives: How many there are.
        ranks: How many take part.
    """
    hops = 2 * math.ceil(math.log2(ranks))
    return size / (1e9 * settings.gigabytes_a_second) + collectives * hops * 1e-6 * settings.hop_microseconds


def _of_owners(forecast: Forecast) -> dict[str, Any]:
    """Returns how busy owners are, and how old inverses get."""
    ages = forecast.ages[0].ages
    if ages is None:
        return {}
    busy = max(ages.busy)
    return {
        "busy": round(busy, 4),
        "largest_staleness": ages.steps,
        "mean_staleness": round(ages.mean_steps, 1),
        "replaced_jobs": round(ages.replaced, 4),
        "first_step_seconds": round(ages.first_seconds, 2),
        "bytes_of_an_owner": max(owner.bytes for owner in forecast.owners),
    }


def table_seconds(groups: int) -> float:
    """Measures what it takes to write the table of the ranks' agreement, which each rank does at each step.

    Args:
        groups: Of the run.
    """
    repetitions = 200
    ledgers = [AdoptionLedger() for _ in range(groups)]
    begun = time.thread_time()
    for _ in range(repetitions):
        encode_table(ledgers, revision=None, stop=False)
    return (time.thread_time() - begun) / repetitions


def describe(content: Mapping[str, Any]) -> str:
    """Puts it into tables, behind its assumptions."""
    config = content["config"]
    ranks = [
        [
            str(each["ranks"]),
            each["gradient_bytes_of_a_rank"] / 1e6,
            sum(each["kfdist_bytes_of_a_rank"].values()) / 1e6,
            f"{each['share_of_gradient']:.2%}" if each["share_of_gradient"] is not None else None,
            1e3 * each["seconds_a_step"],
            f"{each['share_of_step']:.2%}",
            str(content["controller_beats_a_second"][str(each["ranks"])]),
        ]
        for each in content["by_ranks"]
    ]
    names = ("busy", "largest_staleness", "mean_staleness", "replaced_jobs", "first_step_seconds")
    owners = [[str(each["owners"]), *(each.get(name) for name in names)] for each in content["by_owners"]]
    head = ["ranks", "gradient MB", "kfdist MB", "share", "ms a step", "of the step", "beats a second"]
    return "\n".join(
        [
            config["run"],
            "assumed:",
            *(f"  - {sentence}" for sentence in config["assumptions"]),
            "",
            table(head, ranks),
            "(what a rank sends in a step)",
            "",
            table(["owners", "busy", "staleness", "mean", "replaced", "first step, s"], owners),
            f"inversions of one period take {content['seconds_of_inversions_in_a_period']:.1f} s here with "
            f"{config['owner_threads']} threads; writing the ranks' table takes "
            f"{1e6 * content['host_seconds_to_encode_a_table']:.0f} us a step",
            conditions(content),
        ]
    )


def plot(content: Mapping[str, Any]) -> str:
    """Draws what kfdist adds to a step by the ranks, and how old inverses get by the owners."""
    by_ranks, by_owners = content["by_ranks"], [each for each in content["by_owners"] if "busy" in each]
    with drawing(2.9, columns=2) as drawn:
        left, right = drawn.axes
        ranks = [each["ranks"] for each in by_ranks]
        left.plot(ranks, [1e3 * each["seconds_a_step"] for each in by_ranks], color=SERIES[0], marker="o", markersize=3)
        left.set_xlabel("ranks")
        left.set_ylabel("ms that kfdist's traffic takes a step")
        left.set_ylim(bottom=0)
        owners = [each["owners"] for each in by_owners]
        for number, name in enumerate(("largest_staleness", "mean_staleness")):
            values = [each[name] for each in by_owners]
            right.plot(owners, values, color=SERIES[number], marker="o", markersize=3, label=name.partition("_")[0])
        right.set_xlabel("owners")
        right.set_ylabel("staleness in steps")
        right.set_ylim(bottom=0)
        for axes, ticks in ((left, ranks), (right, owners)):
            axes.set_xscale("log")
            plain_powers(axes.xaxis)
            axes.set_xticks(ticks)
        right.legend()
        drawn.figure.subplots_adjust(left=0.12, right=0.98, bottom=0.17, top=0.96, wspace=0.35)
    return drawn.svg


def checked_numbers(values: Sequence[int] | None, usual: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the numbers that were given, rising, or the usual ones."""
    return tuple(sorted(set(values))) if values else usual
