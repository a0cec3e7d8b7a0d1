"""Writes the committed results of `kfdist bench` into README.md and docs/performance.md.

    python -m benchmarks.figures [--check]

Between `<!-- figures: NAME -->` and `<!-- end -->` stands what `benchmarks/results/NAME.json` says, as the command
printed it; in the place of "worth", when each side reached the targets, and of "five", what users ask for first, both
as tables. `--check` only says whether it does.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfdist.bench import inversion, memory_use, on_the_wire, overhead, scaling, stall, target_cells
from kfdist.bench.contest_rivals import RIVALS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

DESCRIBED: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "overhead": overhead.describe,
    "overhead-mlp": overhead.describe,
    "overhead-gpt": overhead.describe,
    "stall": stall.describe,
    "traffic": on_the_wire.describe,
    "inversion": inversion.describe,
    "memory": memory_use.describe,
    "scale": scaling.describe,
    "target": target_cells.describe,
}

_MARKED = re.compile(r"(<!-- figures: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def result(name: str) -> dict[str, Any] | None:
    """Returns a committed result; None where there is none yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def block(name: str) -> str:
    """Returns what stands between the marks of a name."""
    if name == "five":
        return five({each: result(each) for each in DESCRIBED})
    if name == "worth":
        return worth(result("target"))
    content = result(name)
    if content is None:
        return "Not measured yet.\n"
    drawn = f"![{name}](../benchmarks/results/{name}.svg)"  # the pages that have whole results are in docs/
    return f"```\n{DESCRIBED[name](content)}\n```\n\n{drawn}\n"


def five(results: Mapping[str, dict[str, Any] | None]) -> str:
    """Returns the five figures that a user asks for first, as a table; a row is missing where there is no result."""
    rows = []
    if (found := results["overhead"]) is not None:
        tail = found["p99_over_p50"]
        rows.append(
            (
                "A step of ResNet-18 (32 x 32, batch 64), inversions on another core",
                f"{found['mean_ratio_to_sgd']:.2f} x SGD's; p99/p50 {tail['kfdist']:.2f}, SGD's {tail['sgd']:.2f}",
                "overhead",
            )
        )
    if (found := results["stall"]) is not None:
        rows.append(
            (
                f"Steps while an owner is {found['config']['slowdown']} times slower, of {found['config']['workload']}",
                f"p50 {found['p50_ratio']:.3f} x, p99 {found['p99_ratio']:.3f} x those while it isn't",
                "stall",
            )
        )
    if (found := results["traffic"]) is not None:
        shares = (f"{each['kfdist_over_gradient']:.1%} ({name})" for name, each in found["by_method"].items())
        what = f"Bytes beside the gradient's all-reduce, {found['config']['model']}, periods 10 and 100"
        rows.append((what, ", ".join(shares), "traffic"))
    if (found := results["inversion"]) is not None:
        d, times = max(found["times_faster_than_eigh"].items(), key=lambda each: int(each[0]))
        (error,) = (each["error"] for each in found["by_size"]["rs-kfac"] if each["d"] == int(d))
        said = f"{times['rs-kfac']:.0f} times faster; error of the direction {error:.1%}"
        rows.append((f"`rs-kfac`'s inversion at d = {d} against an eigendecomposition", said, "inversion"))
    if (found := results["memory"]) is not None:
        peak = {name: size / 1e9 for name, size in found["peak_bytes"].items()}
        most = max(size for name, size in peak.items() if name != "sgd")
        what = f"The most memory that a rank takes, {found['config']['method']}, of {found['config']['workload']}"
        rows.append((what, f"{most:.2f} GB, SGD's {peak['sgd']:.2f}", "memory"))
    if not rows:
        return "Not measured yet.\n"
    head = ["| question | answer | `kfdist bench` |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {what} | {said} | `{name}` |" for what, said, name in rows)]) + "\n"


def worth(target: Mapping[str, Any] | None) -> str:
    """Returns seconds and steps to each target that both sides were trained for, as a table."""
    if target is None:
        return "Not measured yet.\n"
    rows = []
    for task, goal in target["config"]["goals"].items():
        found = {name: each for name in RIVALS if (each := _summed_up(target, task, name)) is not None}
        sides = [{name: each for name, each in found.items() if RIVALS[name].kfdist is ours} for ours in (True, False)]
        if all(sides) and "optimizer" in found and "adamw" in found:
            cells = [said(found["optimizer"]), said(found["adamw"]), *(soonest(side) for side in sides)]
            rows.append(f"| {goal['title']}: {goal['metric']} {goal['goal']:.2g} | {' | '.join(cells)} |")
    if not rows:
        return "Not measured yet.\n"
    columns = "`kfdist.Optimizer`, untuned", "AdamW, tuned", "kfdist's best, tuned", "best of the others, tuned"
    return "\n".join([f"| to a target | {' | '.join(columns)} |", "|---|---|---|---|---|", *rows]) + "\n"


def _summed_up(target: Mapping[str, Any], task: str, rival: str) -> dict[str, Any] | None:
    cells = target_cells.cells_of(target["cells"], task, rival)
    found = target_cells.best(cells)
    return found and {**found, "limit": max(cell["limit"] for cell in cells)}


def said(found: Mapping[str, Any]) -> str:
    """Says when a target was reached, or what was reached in place of it, and where only the tuning's seed says so."""
    alone = " (tuning's seed alone)" if found["tuned"] else ""
    if found["seconds"] is None:
        return ("diverges" if found["last"] is None else f"{found['last']:.2g} after {found['limit']:g} s") + alone
    seconds = f"{found['seconds']:.0f}" if found["seconds"] >= 10 else f"{found['seconds']:.2g}"
    return f"{seconds} s, {found['steps']:.0f} steps{alone}"


def soonest(side: Mapping[str, Mapping[str, Any]]) -> str:
    """Names who reached a target first, or came closest, and says when."""

    def rank(name: str) -> tuple[float, float]:
        seconds, last = (side[name][key] for key in ("seconds", "last"))
        return math.inf if seconds is None else seconds, math.inf if last is None else last

    first = min(side, key=rank)
    return f"{first}: {said(side[first])}"


def filled(text: str) -> str:
    """Returns a page with its blocks as the results have them."""
    return _MARKED.sub(lambda found: f"{found[1]}{block(found[2])}{found[4]}", text)


def main() -> int:
    """Writes the pages, or checks them."""
    stale = [page for page in PAGES if filled(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    if "--check" not in sys.argv:
        for page in stale:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    for page in stale:
        print(page.relative_to(ROOT))
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
