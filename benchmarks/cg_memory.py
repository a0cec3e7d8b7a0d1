"""Shows CG-FAC's CPU time and peak memory against K-FAC's for widths from 256 to 8192.

    python benchmarks/cg_memory.py [D ...]

Prints a table and writes it, with hardware and versions, to benchmarks/results/cg_memory.json. One thread; whatever
would take longer than 20 s is skipped, and the table says so.
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kfdist.bench.claim_b_cg import CG_SETTINGS, SIZES, measure_cg
from kfdist.bench.measuring import hardware, load_average
from kfdist.system.provenance import versions

RESULT = Path(__file__).parent / "results" / "cg_memory.json"


def describe(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return "not run"
    steps = f", {measured['iterations']} iterations" if "iterations" in measured else ""
    return (
        f"peak {measured['peak_bytes'] / 2**20:7.1f} MiB  kept {measured['kept_bytes'] / 2**20:6.1f} MiB  "
        f"invert {measured['seconds_invert']:8.4f} s  apply {measured['seconds_apply']:8.4f} s  "
        f"a step {measured['seconds_per_step']:8.4f} s{steps}"
    )


def main() -> None:
    """Runs, prints and writes."""
    sizes = [int(argument) for argument in sys.argv[1:]] or SIZES
    load = load_average()
    result = measure_cg(sizes)
    for row in result["sizes"]:
        for name in ("kfac", *CG_SETTINGS):
            print(f"d = {row['d']:5}  {name:30}  {describe(row[name])}")
    written = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {**hardware(), "load_before": load},
        "versions": versions(),
        **result,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
