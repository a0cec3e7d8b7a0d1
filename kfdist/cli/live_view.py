"""A run at a glance: where it stands, who is alive, how the loss goes, and how stale each block is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.text import Text

from kfdist.cli.block_table import PERIOD, STALENESS, age, block_table, blocks_of, rank_note, shortened, steps
from kfdist.control.client import OwnerView, RunView
from kfdist.control.control_records import RunState
from kfdist.telemetry.metrics import METRICS, Kind
from kfdist.training.progress import duration
from kfdist.types import MetricSample

STATE_STYLES = {
    RunState.RUNNING: "green",
    RunState.FINISHED: "green",
    RunState.PAUSED: "yellow",
    RunState.STOPPING: "yellow",
    RunState.STOPPED: "yellow",
    RunState.FAILED: "red",
    RunState.LOST: "red",
}
_AGE = "kfdist_staleness_seconds"
_FEWEST_BLOCKS = 3
_LISTED_OWNERS = 4
_FULL_BAR_PERIODS = 3
"""A bar is full where a block's inverse is so many times as old as the steps between two of its inverses."""
_TROUBLE = (
    ("kfdist_fallbacks_total", "fallbacks"),
    ("kfdist_failures_total", "failures"),
    ("kfdist_restarts_total", "restarts"),
    ("kfdist_nonfinite_drops_total", "batches dropped"),
    ("kfdist_samples_lost_total", "samples lost"),
)
"""Counters of what should stay at zero, and what they are called."""

Fact = tuple[str, str]
"""A name and a value, kept on one line together."""


@dataclass(frozen=True, kw_only=True)
class RunPicture:
    """What a frame shows.

    Attributes:
        run: The run.
        samples: What its processes measured.
        owners: The live owners.
        losses: The losses that were seen, oldest first.
        rate: Steps a second; None if not known yet.
        note: What the reader should know, such as that the controller doesn't answer.
    """

    run: RunView
    samples: Sequence[MetricSample] = ()
    owners: Sequence[OwnerView] = ()
    losses: Sequence[float] = ()
    rate: float | None = None
    note: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = not options.encoding.lower().startswith("utf")
        width, height = options.max_width, options.height or console.height
        above = [*self._headings(width, plain)]
        yield from above
        room = height - sum(len(console.render_lines(each, options, pad=False)) for each in above) - 6
        yield from self._blocks(width, room, plain)
        if self.note:
            yield Text()
            yield Text(self.note, style="dim" if self.note.startswith("Ctrl-C") else "bold yellow")

    def _headings(self, width: int, plain: bool) -> Iterator[RenderableType]:
        run = self.run
        state, step = run.state.value, f"step {step_of(run)}"
        name = shortened(run.name, max(5, width - len(state) - len(step) - 4))
        yield Text.assemble((name, "bold"), "  ", (state, STATE_STYLES.get(run.state, "")), "  ", step)
        yield from _progress(run, self.rate, width)
        yield Text()
        yield from fact_lines(self._members(), width)
        yield from self._loss(width, plain)
        yield from fact_lines(self._measured(), width)
        if trouble := self._trouble():
            yield from fact_lines(trouble, width, style="yellow")

    def _members(self) -> list[Fact]:
        run = self.run
        facts = [("ranks", ranks_of(run)), ("owners", _owners(run.live_owners, self.owners)), ("start", str(run.epoch))]
        if self.rate is not None:
            facts.append(("steps/s", f"{self.rate:.3g}"))
        return [*facts, ("in", run.directory)] if run.directory else facts

    def _loss(self, width: int, plain: bool) -> Iterator[Text]:
        if (loss := self.run.gauges.get("kfdist_loss")) is None:
            return
        line = _fact_text("loss", f"{loss:.4g}")
        if not math.isfinite(loss):
            line.stylize("red")
        room = min(60, width - len(line) - 2)
        if room >= 8 and len(self.losses) > 1:
            line.append("  ").append(sparkline(self.losses, room, plain=plain), style="cyan")
        yield line

    def _measured(self) -> list[Fact]:
        # Of the samples where there are any: ages rise while ranks hang; what rank 0 sent last doesn't.
        stalest, periods = self._stalest(), self._periods()
        gauges = {**self.run.gauges, **{name: value for name, value in stalest.items() if name in (STALENESS, _AGE)}}
        often = f", inverted every {steps(stalest[PERIOD])}" if PERIOD in stalest and len(set(periods)) > 1 else ""
        named = (
            ("accuracy", "kfdist_accuracy", lambda value: f"{value:.2%}"),
            ("damping", "kfdist_damping", lambda value: f"{value:.3g}"),
            ("noise scale", "kfdist_gradient_noise_scale_examples", lambda value: f"{value:,.0f} examples"),
            ("waiting inversions", "kfdist_queue_depth", steps),
            ("stalest block", STALENESS, lambda value: f"{steps(value)} steps{often}"),
            ("its age", _AGE, age),
        )
        found = [(name, form(gauges[metric])) for name, metric, form in named if metric in gauges]
        if periods:
            span = " to ".join(steps(value) for value in sorted({min(periods), max(periods)}))
            found.append(("inverses every", f"{span} steps"))
        return found

    def _stalest(self) -> Mapping[str, float]:
        """Returns what was measured of the block whose inverse is the oldest by the block's own period, if any has."""
        first = next(iter(blocks_of(self.samples)), None)
        return {} if first is None or first.staleness is None else first.values

    def _periods(self) -> list[float]:
        """Returns the blocks' steps between two inverses; ranks of before these were told tell the run's alone."""
        periods = [sample.value for sample in self.samples if sample.name == PERIOD]
        return periods or [value for name, value in self.run.gauges.items() if name == "kfdist_inverse_period_steps"]

    def _trouble(self) -> list[Fact]:
        totals: dict[str, float] = {}
        for sample in self.samples:
            if sample.name in METRICS and METRICS[sample.name].kind is Kind.COUNTER:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return [(name, steps(totals[metric])) for metric, name in _TROUBLE if totals.get(metric)]

    def _blocks(self, width: int, room: int, plain: bool) -> Iterator[RenderableType]:
        blocks = blocks_of(self.samples)
        if not blocks:
            return
        # Ranks of before blocks' periods were told tell the run's alone.
        period = 1.0 if PERIOD in self.run.gauges else self.run.gauges.get("kfdist_inverse_period_steps", 0.0)
        full = _FULL_BAR_PERIODS * period or max(blocks[0].periods_old or 0.0, 1.0)
        shown = blocks[: max(_FEWEST_BLOCKS, room)]
        yield Text()
        yield block_table(shown, width, full_bar=full, plain=plain)
        if note := rank_note(self.samples):
            yield Text(note, style="dim")
        if rest := len(blocks) - len(shown):
            stale = [block.staleness for block in blocks[len(shown) :] if block.staleness is not None]
            than = f", none staler than {steps(max(stale))} steps" if stale else ""
            yield Text(shortened(f"and {rest} more{than}", width), style="dim")


def step_of(run: RunView) -> str:
    """Returns the step, and of how many if that is known."""
    return f"{run.step}/{run.total_steps}" if run.total_steps else str(run.step)


def ranks_of(run: RunView) -> str:
    """Returns how many ranks are alive, and of how many if some are not."""
    return f"{run.live_workers} of {run.world_size}" if run.live_workers < run.world_size else str(run.live_workers)


def sparkline(values: Sequence[float], width: int, *, plain: bool = False) -> str:
    """Draws values from left to right, a column each or the mean of several; "!" where one is no finite number.

    Values that differ by more than a factor of 50 are drawn by their logarithms, as a loss is that falls.
    """
    marks = "_.-=*#" if plain else "▁▂▃▄▅▆▇█"
    count = min(width, len(values))
    if not count:
        return ""
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    if finite and 0 < 50 * min(finite) < max(finite):
        means = [math.log(mean) if math.isfinite(mean) else mean for mean in means]
        finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)

    def mark(mean: float) -> str:
        if not math.isfinite(mean):
            return "!"
        share = (mean - low) / (high - low) if high > low else 0.0
        return marks[min(len(marks) - 1, int(share * len(marks)))]

    return "".join(map(mark, means))


def fact_lines(facts: Sequence[Fact], width: int, style: str = "") -> Iterator[Text]:
    """Puts facts side by side, as many as fit in a line; one that is too long for a line loses its middle."""
    line = Text()
    for name, value in facts:
        fact = _fact_text(name, shortened(value, max(5, width - len(name) - 1)), style)
        if len(line) and len(line) + 3 + len(fact) > width:
            yield line
            line = Text()
        line = Text.assemble(line, "   ", fact) if len(line) else fact
    if len(line):
        yield line


def _fact_text(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((name, "dim"), " ", (value, style))


def _progress(run: RunView, rate: float | None, width: int) -> Iterator[RenderableType]:
    if not run.total_steps:
        return
    share = f" {min(1.0, run.step / run.total_steps):4.0%}"
    left = ""
    if rate and run.state is RunState.RUNNING:
        left = f"  {duration((run.total_steps - run.step) / rate)} left"
    room = min(60, width - len(share) - len(left))
    if room < 5:
        return
    yield _Side(ProgressBar(total=run.total_steps, completed=run.step, width=room), room, share + left)


@dataclass(frozen=True)
class _Side:
    """A bar with a text to its right."""

    bar: ProgressBar
    width: int
    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from console.render(self.bar, options.update_width(self.width))
        yield Text(self.text)


def _owners(live: int, owners: Sequence[OwnerView]) -> str:
    counts = sorted((owner.groups for owner in owners), reverse=True)
    if not any(counts):
        return str(live)
    groups = " + ".join(map(str, counts)) if len(counts) <= _LISTED_OWNERS else f"{counts[-1]} to {counts[0]}"
    drained = sum(owner.draining for owner in owners)
    return f"{live} (groups {groups}{f', {drained} drained' if drained else ''})"
