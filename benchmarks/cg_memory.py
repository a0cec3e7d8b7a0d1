"""Shows CG-FAC's CPU time and peak memory against K-FAC's for widths from 256 to 8192.

    python benchmarks/cg_memory.py [D ...]

Prints a table and writes it, with hardware and versions, to benchmarks/results/cg_memory.json. One thread; whatever
would take longer than 20 s is skipped, and the table says so.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kfdist.bench.claim_b_cg import CG_SETTINGS, CONDITIONS, SIZES, measure_cg
from kfdist.bench.measuring import measured

RESULT = Path(__file__).parent / "results" / "cg_memory.json"


def describe(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    steps = f", {row['iterations']} iterations" if "iterations" in row else ""
    return (
        f"peak {row['peak_bytes'] / 2**20:7.1f} MiB  kept {row['kept_bytes'] / 2**20:6.1f} MiB  "
        f"invert {row['seconds_invert']:8.4f} s  apply {row['seconds_apply']:8.4f} s  "
        f"a step {row['seconds_per_step']:8.4f} s{steps}"
    )


def main() -> None:
    """Runs, prints and writes."""
    sizes = [int(argument) for argument in sys.argv[1:]] or SIZES
    result = measured(lambda: {**CONDITIONS, "sizes": measure_cg(sizes)})
    for row in result["sizes"]:
        for name in ("kfac", *CG_SETTINGS):
            print(f"d = {row['d']:5}  {name:30}  {describe(row[name])}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
