"""Shows SENG's forms (explicit, implicit, sketched, mean-field) and its aggregates over ranks against the dense solve.

    python benchmarks/seng_forms.py

Prints error, seconds and bytes of each form, and how far the average of the ranks' separate operators is from the
operator of all examples at 1, 2 and 4 ranks; writes them to benchmarks/results/seng_forms.json in about half a minute.
"""

import json
from pathlib import Path

from kfdist.bench.claim_c_seng import measure_seng
from kfdist.bench.measuring import measured

RESULT = Path(__file__).parent / "results" / "seng_forms.json"


def main() -> None:
    """Measures, prints and writes."""
    found = measured(measure_seng)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print("v/lambda:", ", ".join(f"{kind} {error:.2g}" for kind, error in found["gradient_to_dense"].items()))
    for name, row in found["forms"].items():
        errors = ", ".join(f"{kind} {error:.2g}" for kind, error in row["error_to_dense"].items())
        seconds = f"{row['invert_seconds']:.3f} s, {1e3 * row['apply_seconds']:.1f} ms"
        print(f"{name:22} {seconds}, {row['record_bytes'] / 1e6:.1f} MB; error: {errors}")
    for kind, rows in found["aggregates"].items():
        for ranks, row in rows.items():
            print(f"{kind:14} {ranks} ranks: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()))


if __name__ == "__main__":
    main()
