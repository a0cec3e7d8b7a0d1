"""The chapters about the training itself: loss, accuracy, noise, events and the configuration."""

from collections.abc import Iterator
from typing import Any

from kfdist.policies.advice import batch_advice, shortest_period
from kfdist.report import figures, words
from kfdist.report.figures import Curve
from kfdist.report.parts import Chapter, Plot, Table, curve, flat, inverts, later_starts
from kfdist.report.recorded import SHOWN_EVENTS, Line, Recorded

_FOLDED_FROM = 20
_NAMED_RESUMES = 6


def progress(run: Recorded) -> Chapter:
    """Returns the chapter on loss and accuracy."""
    title = "Loss and accuracy"
    if not run.steps and not run.evaluations:
        period = run.config.get("run", {}).get("log_period", 10)
        lacking = f"No log period ({words.counted(period, 'step')}) was completed, so there is no loss to show."
        return Chapter(title=title, sentences=[lacking])
    plots, rows = [], []
    for name in metric_names(run):
        curves = list(metric_curves(run, name))
        if not curves:
            continue
        accuracy = name.endswith("accuracy")
        svg = figures.lines(
            curves, x="step", y=name, starts=later_starts(run), percent=accuracy, log=False if accuracy else None
        )
        ends = words.listed([f"{each.name} {words.metric(name, each.y[-1])}" for each in curves])
        plots.append(Plot(svg=svg, told=f"{name.capitalize()} by step; at the end {ends}."))
        for each in curves:
            best, where = (max if accuracy else min)(zip(each.y, each.x, strict=True))
            shown = [words.metric(name, value) for value in (each.y[0], each.y[-1], best)]
            rows.append([f"{name}, {each.name}", *shown, words.number(where)])
    table = Table(caption=title, heads=("", "first", "last", "best", "at step"), rows=rows)
    return Chapter(title=title, sentences=list(_remarks(run)), plots=plots, tables=[table])


def _remarks(run: Recorded) -> Iterator[str]:
    if not run.evaluations:
        yield "The run was never evaluated on the test data, so there is no validation to show."
    if resumes := later_starts(run):
        steps = words.listed([f"{step:,}" for step in resumes[:_NAMED_RESUMES]])
        more = len(resumes) - _NAMED_RESUMES
        also = f", and {words.counted(more, 'more time')}" if more > 0 else ""
        yield f"The run was resumed at step {steps}{also}; dotted lines mark it."


def metric_names(run: Recorded) -> list[str]:
    """Returns what is measured, the loss first."""
    evaluated = {key.removeprefix("test_") for line in run.evaluations[:1] for key in line if key.startswith("test_")}
    trained = {"accuracy"} & {key for line in run.steps[:1] for key in line}
    return ["loss", *sorted((evaluated | trained) - {"loss"})]


def metric_curves(run: Recorded, name: str) -> Iterator[Curve]:
    """Yields a metric in training and in validation by step, each that has a value."""
    yield from curve(run.steps, name, Curve(name="training", x=(), y=()))
    for weights, shown, colour in (("trained", "validation", 1), ("averaged", "validation, averaged weights", 2)):
        like = Curve(name=shown, x=(), y=(), colour=colour, marked=True)
        yield from curve(run.evaluated(weights), f"test_{name}", like)


def step_lengths(run: Recorded) -> Chapter:
    """Returns the chapter on how far steps move the blocks."""
    title = "Length of steps"
    curves = list(_spread(run, "step_length", "step", 0))
    if not curves:
        return Chapter(
            title=title, sentences=["It was not measured: no block is preconditioned, or steps were too few."]
        )
    grafts = list(_spread(run, "graft_ratio", "graft", 2))
    clips = list(curve(run.steps, "kl_clip_factor", Curve(name="factor of the KL clip", x=(), y=(), colour=4)))
    plots = [
        Plot(
            svg=figures.lines(each, x="step", y=what, starts=later_starts(run)),
            told=f"{what.capitalize()} by step; at the end "
            f"{words.listed([f'{one.name} {words.number(one.y[-1])}' for one in each])}.",
        )
        for what, each in (("change over norm", curves), ("factor of directions", [*grafts, *clips]))
        if each
    ]
    counts = (line.get("graft_replacements") for line in reversed(run.steps))
    replaced = next((count for count in counts if count is not None), 0)  # of the last start, be it none
    return Chapter(
        title=title,
        sentences=[
            "How far a step moved the parameters of a block: the norm of their change over their own, lr |direction| / "
            "|theta|. Of a step in each log period; the median and the largest over the blocks.",
            *(
                ["A graft multiplies a direction by the length of its own update over the direction's."]
                if grafts
                else []
            ),
            *([f"In the last start {replaced:,.0f} directions gave way to the graft's update."] if replaced else []),
        ],
        plots=plots,
        tables=[_lengths_by_block(run)],
    )


def _lengths_by_block(run: Recorded) -> Table:
    """Returns the last lengths of each block, the longest step first."""
    last = next((line for line in reversed(run.windows) if line.get("step_lengths")), {})
    steps, grafts = last.get("step_lengths", {}), last.get("graft_ratios", {})
    order = sorted(steps, key=lambda name: steps[name] or 0.0, reverse=True)
    return Table(
        caption=f"Length of a step up to step {last.get('step', 0):,}",
        heads=("block", "change over norm", "graft's factor"),
        rows=[[name, words.number(steps[name]), words.number(grafts.get(name))] for name in order],
        folded=len(order) > _FOLDED_FROM,
    )


def _spread(run: Recorded, key: str, name: str, colour: int) -> Iterator[Curve]:
    """Yields the median and the largest of what a step has of all blocks."""
    lines = [{"step": line["step"], **(line.get(key) or {})} for line in run.steps]
    yield from curve(lines, "p50", Curve(name=f"{name}, median", x=(), y=(), colour=colour))
    yield from curve(lines, "max", Curve(name=f"{name}, largest", x=(), y=(), colour=colour + 1))


def noise(run: Recorded) -> Chapter:
    """Returns the chapter on the gradient noise scale."""
    title = "Gradient noise scale"
    scales = list(curve(run.steps, "noise_scale", Curve(name="noise scale", x=(), y=())))
    if not scales:
        return Chapter(
            title=title,
            sentences=[
                "It was not measured: it takes two ranks or two micro-batches (data.micro_batches), and gradients that "
                "are more than noise. docs/large-batch.md says when there is none."
            ],
        )
    [found] = scales
    later = sorted(found.y[len(found.y) // 2 :])
    scale = later[len(later) // 2]
    if (batch := batch_examples(run)) is not None:
        ends = [found.x[0], found.x[-1]]
        scales.append(Curve(name="the run's batch", x=ends, y=[batch, batch], colour=1, dashed=True))
    told = f"The gradient noise scale by step; {words.number(scale)} examples in the median of the run's second half."
    svg = figures.lines(scales, x="step", y="examples", starts=later_starts(run))
    return Chapter(title=title, sentences=advice(run, scale, batch), plots=[Plot(svg=svg, told=told)])


def batch_examples(run: Recorded) -> int | None:
    """Returns how many examples a step of the last start takes; None if that isn't known."""
    size = run.config.get("data", {}).get("batch_size")
    ranks = run.starts[-1].get("world_size") if run.starts else None
    return size * ranks if size and ranks else None


def advice(run: Recorded, scale: float, batch: int | None) -> list[str]:
    """Says what a gradient noise scale means for a run.

    Args:
        run: The run.
        scale: In examples.
        batch: Examples a step; None if unknown.
    """
    measured = f"In the second half of the run the gradient noise scale was {words.number(scale)} examples (median)."
    if batch is None:
        return [measured]
    known = run.windows[-1].get("periods", ()) if run.windows else ()  # none in older histories
    period, key = shortest_period(run.config.get("preconditioner", {}), known)
    owners = run.config.get("cluster", {}).get("owners", 0) if inverts(run) else 0
    return [measured, *batch_advice(batch, scale, owners=owners, period=period, period_key=key)]


def events(run: Recorded) -> Chapter:
    """Returns the chapter on what happened."""
    rows = [(line["time"], line["event"], _event_text(line)) for line in run.told]
    rows += [(when, f"controller: {kind}", text) for when, kind, text in run.controller_events]
    rows.sort()
    kept = rows[-SHOWN_EVENTS:]
    if not kept:
        return Chapter(title="Events", sentences=["Nothing was recorded."])
    table = Table(
        caption="Events",
        heads=("when", "what", ""),
        rows=[[words.moment(when), what, text] for when, what, text in kept],
        folded=len(kept) > _FOLDED_FROM,
    )
    newest = [f"The newest {len(kept)} of {len(rows)} events."] if len(rows) > len(kept) else []
    return Chapter(title="Events", sentences=newest, tables=[table])


def _event_text(line: Line) -> str:
    step = f"step {line['step']:,}"
    if line["event"] == "checkpoint":
        if line.get("fault"):
            return f"{step}: could not be written: {line['fault']}"
        return f"{step}: {words.size(line.get('bytes', 0))} in {words.seconds(line.get('seconds'))}"
    known = {key: value for key, value in line.items() if key not in ("event", "time", "step", "versions", "hardware")}
    return ", ".join([step, *(f"{key.replace('_', ' ')} {words.number(value)}" for key, value in known.items())])


def configuration(run: Recorded) -> Chapter:
    """Returns the chapter on configuration, versions and hardware."""
    start = run.starts[-1] if run.starts else {}
    facts = {**(start.get("versions") or {}), **(start.get("hardware") or {})}
    settings = flat(run.config)
    versions = Table(
        caption="Versions and hardware", heads=("what", ""), rows=[[*map(_plain, row)] for row in facts.items()]
    )
    config = Table(
        caption="Configuration", heads=("key", "value"), rows=[[*map(_plain, row)] for row in settings], folded=True
    )
    return Chapter(
        title="Configuration, versions and hardware",
        sentences=[
            *([] if facts else ["Versions and hardware aren't known: the run didn't come to its first step."]),
            *([] if settings else ["The configuration isn't known."]),
        ],
        tables=[table for table in (versions, config) if table.rows],
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
