"""Writes the committed results of `kfdist bench` into README.md and docs/performance.md.

    python -m benchmarks.figures [--check]

Between `<!-- figures: NAME -->` and `<!-- end -->` stands what `benchmarks/results/NAME.json` says, as the command
printed it; between `<!-- figures: five -->` and the end, five of them as a table. `--check` only says whether it does.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfdist.bench import inversion, memory_use, on_the_wire, overhead, scaling, stall, to_target

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
    "target": to_target.describe,
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
    if (found := results["target"]) is not None:
        for task, words in found["config"]["goals"].items():
            if (said := soonest(found, task)) is not None:
                rows.append((f"Seconds to {words['metric']} {words['goal']:g}, {task}", said, "target"))
    if not rows:
        return "Not measured yet.\n"
    head = ["| question | answer | `kfdist bench` |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {what} | {said} | `{name}` |" for what, said, name in rows)]) + "\n"


def soonest(content: Mapping[str, Any], task: str) -> str | None:
    """Says when the best of kfdist's and the best of the others reached a task's goal."""
    by_side: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
    for name, rival in to_target.RIVALS.items():
        cells = [each for each in content["cells"].values() if (each["task"], each["rival"]) == (task, name)]
        found = to_target.best(cells)
        if found is not None:
            by_side[rival.kfdist].append((float("inf") if found["seconds"] is None else found["seconds"], name))
    if not all(by_side.values()):
        return None
    said = []
    for side in (True, False):
        seconds, name = min(by_side[side])
        said.append(f"{name} {'never' if seconds == float('inf') else f'{seconds:.1f} s'}")
    return f"kfdist's best: {said[0]}; best of the others: {said[1]}"


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
