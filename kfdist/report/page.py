"""A run's page: from its directory to one HTML file that needs nothing else."""

import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from kfdist.errors import EnvironmentFault
from kfdist.report import cost_chapters as costs
from kfdist.report import inversion_chapters as inverses
from kfdist.report import training_chapters as training
from kfdist.report import words
from kfdist.report.drawing import unique
from kfdist.report.parts import Chapter
from kfdist.report.recorded import Recorded
from kfdist.system.files import replace_file
from kfdist.system.run_summary import unsaved

CHAPTERS = (
    training.progress,
    inverses.staleness,
    costs.step_time,
    costs.inversions,
    costs.bytes_moved,
    inverses.spectra,
    inverses.diagnostics,
    training.step_lengths,
    training.noise,
    training.events,
    training.configuration,
)
"""What a page says of a run, in order; each takes the run."""


def write_report(directory: Path, output: Path | None = None) -> Path:
    """Writes the page about a run.

    Args:
        directory: The run's.
        output: The file; `report.html` in the run directory if not given.

    Returns:
        The file.

    Raises:
        ConfigError: It isn't a run directory.
        EnvironmentFault: It can't be read, or the file can't be written.
    """
    run = Recorded.of(directory)
    page = render(
        title=f"Run {run.name}",
        sentences=[status(run), *run.remarks],
        facts=facts(run),
        chapters=[write(run) for write in CHAPTERS],
        footer=f"Made from {directory}",
    )
    return write_page(output or directory / "report.html", page)


def write_page(file: Path, page: str) -> Path:
    """Writes a page; whole, or not at all.

    Raises:
        EnvironmentFault: It can't be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, page.encode())
    except OSError as error:
        raise EnvironmentFault(f"the report can't be written to {file}: {error}; choose another --output") from None
    return file


def render(
    *,
    title: str,
    sentences: Sequence[str],
    facts: Sequence[tuple[str, str]],
    chapters: Sequence[Chapter],
    footer: str,
) -> str:
    """Returns a page as HTML; all text is escaped but the figures."""
    environment = Environment(
        loader=PackageLoader("kfdist.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["unique"] = unique
    return environment.get_template("page.html").render(
        title=title,
        sentences=sentences,
        facts=facts,
        chapters=chapters,
        footer=f"{footer} by kfdist {metadata.version('kfdist')} on {words.moment(time.time())}.",
    )


def status(run: Recorded) -> str:
    """Says how the run stands."""
    found, step, ended = run.summary.get("status"), run.last_step, run.summary.get("ended", "")
    if run.holder is not None:
        return f"The run goes on: step {step:,} was done when this page was made."
    if found == "finished":
        lost = unsaved(run.summary)
        told = f" But {lost}." if lost else ""
        return f"The run is finished: {words.counted(run.summary.get('steps', step), 'step')}.{told}"
    kept = any(line["event"] == "checkpoint" and not line.get("fault") for line in run.told)
    resumable = f"The same command {'resumes it from its newest checkpoint' if kept else 'begins it anew'}."
    seen = f" The launcher says: {ended}." if ended else ""
    if found == "stopped":
        reason = run.summary.get("stop_reason", "")
        return f"The run stopped at step {run.summary.get('steps', step):,}: {reason}.{seen} {resumable}"
    last = f"The last step known is {step:,}."
    if found == "failed":
        error = str(run.summary.get("error", "")).removesuffix(".")
        # What the launcher saw first is the cause; a rank that lost a peer knows no more than that.
        causes = f"{ended}. Rank 0: {error}" if ended else error
        return f"The run failed: {causes}. {last} {resumable}"
    how = (
        f"The run's last start was cut off: {ended}."
        if ended
        else "The run's last start ended without saying how, perhaps killed."
    )
    return f"{how} {last} {resumable}"


def facts(run: Recorded) -> list[tuple[str, str]]:
    """Returns the numbers that matter most, as far as they are known."""
    summary = run.summary
    metrics, staleness = summary.get("metrics") or {}, summary.get("staleness_steps") or {}
    trained = summary.get("seconds") or (run.seconds() or [(0, None)])[-1][1]
    steps = summary.get("step_seconds") or {}
    known = [
        ("steps", words.number(summary.get("steps", run.last_step))),
        ("trained for", words.seconds(trained)),
        *(
            (f"{name.replace('_', ' ')}", words.metric(name, value))
            for name, value in metrics.items()
            if value is not None
        ),
        ("step, p50", words.seconds(steps.get("p50"))),
        ("step, p99", words.seconds(steps.get("p99"))),
        ("staleness, median", words.number(staleness.get("p50"))),
        ("staleness, largest", words.number(staleness.get("max"))),
    ]
    return [(name, value) for name, value in known if value != "–"]
