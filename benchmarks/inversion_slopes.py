"""Shows how the time of one inversion grows with the size d of a factor: kfac, kfac-eigen, rs-kfac, b-kfac.

Claim: the exponents, by least squares of log time over log d, are about 3, 3, 2 and 1, and at most 1.2 for b-kfac from
d = 1024 to 16384. The block has one factor of size d and one of size 16, so the large one takes nearly all the time.
Rank and rows are the same for all d. Only `invert` is timed, in float32 on one thread: for rs-kfac of a given dense
factor, for b-kfac one Brand update of a state that has reached its rank. The sums of outer products before it (d^2 for
the others, none for b-kfac) aren't included. Seconds are CPU seconds of the thread, which other processes lengthen less
than wall-clock time; the load is recorded with them.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.statistics import Increment, KroneckerFactors
from kfdist.system.provenance import versions

SMALL = 16
RANK, ROWS = 64, 64
DAMPING = 1e-2
SECONDS_LIMIT = 20.0
LINEAR_LIMIT = 1.2
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the table.

    Attributes:
        name: Key of the inverters' table.
        settings: The inverter's settings.
        sizes: d to measure, rising; once one would take too long, the rest is skipped.
        expected: The exponent of its operation count.
    """

    name: str
    settings: dict[str, int]
    sizes: tuple[int, ...]
    expected: int


METHODS = (
    Method(name="kfac", settings={}, sizes=(1024, 1448, 2048, 2896, 4096, 5792, 8192), expected=3),
    Method(name="kfac-eigen", settings={}, sizes=(512, 724, 1024, 1448, 2048, 2896, 4096), expected=3),
    Method(
        name="rs-kfac", settings={"rank": RANK}, sizes=(1024, 1448, 2048, 2896, 4096, 5792, 8192, 11585), expected=2
    ),
    Method(
        name="b-kfac",
        settings={"rank": RANK, "increment_rows": ROWS},
        sizes=(1024, 1448, 2048, 2896, 4096, 5792, 8192, 11585, 16384),
        expected=1,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One point of a line.

    Attributes:
        method: Name of the inverter.
        d: Size of the large factor.
        seconds: CPU seconds of the shortest repetition: other load only lengthens them.
        repetitions: Number of repetitions.
    """

    method: str
    d: int
    seconds: float
    repetitions: int


def draw_rows(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, n, d, generator=generator)


def inversion_of(method: Method, d: int) -> Callable[[], object]:
    """Returns the call to be timed, with its arguments prepared."""
    inverter = make_inverter(method.name, **method.settings)
    rows = draw_rows(SMALL, SMALL, 1)
    G = rows.mT @ rows
    if method.name != "b-kfac":
        rows = draw_rows(4 * RANK, d, 0)
        factors = KroneckerFactors(A=rows.mT @ rows, G=G)
        return lambda: inverter.invert(factors, damping=DAMPING, previous={}, seed=0)

    def increment(seed: int) -> Increment:
        scalar, absent = torch.tensor(0.05 * ROWS), torch.zeros(1, 0, 0)
        own = 0.05**0.5 * draw_rows(ROWS, d, seed)
        empty = torch.zeros(1, 0, SMALL)
        return Increment(
            A_rows=own,
            G_rows=empty,
            examples=scalar,
            positions=scalar,
            decay=torch.tensor(0.95),
            A=absent,
            G=G if seed == 0 else absent,
        )

    state: dict[str, Tensor] = {}
    for seed in range(3):  # the rank is reached with the first, the width with the second
        state = dict(inverter.invert(increment(seed), damping=DAMPING, previous=state, seed=0).state)
    last = increment(3)
    return lambda: inverter.invert(last, damping=DAMPING, previous=state, seed=0)


def measure(method: Method, d: int) -> Timing:
    """Times one size, up to twenty times while that takes less than six seconds."""
    invert, seconds = inversion_of(method, d), []
    while not seconds or (len(seconds) < 20 and sum(seconds) < 6.0):
        started = time.thread_time()
        invert()
        seconds.append(time.thread_time() - started)
    return Timing(method=method.name, d=d, seconds=min(seconds), repetitions=len(seconds))


def slope(timings: Sequence[Timing]) -> float:
    """Returns the exponent: the least-squares slope of log time over log d."""
    x, y = [math.log(each.d) for each in timings], [math.log(each.seconds) for each in timings]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def write_results(timings: Sequence[Timing], slopes: dict[str, float], load: dict[str, float]) -> Path:
    """Writes the figures with the hardware, its load and the versions they were measured on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "inversion_slopes.json"
    content = {
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "slopes": {name: round(value, 3) for name, value in slopes.items()},
        "expected": {method.name: method.expected for method in METHODS},
        "settings": {"rank": RANK, "rows": ROWS, "dtype": "float32", "other_factor": SMALL},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": torch.get_num_threads(),
        "load_average": load,
        "versions": versions(),
        "timings": [asdict(timing) for timing in timings],
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Times all methods and sizes, prints the slopes and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=SECONDS_LIMIT, help="longest inversion, in seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = {"start": os.getloadavg()[0]}
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}, load {load['start']:.1f}"
    )
    timings: list[Timing] = []
    for method in METHODS:
        for d in method.sizes:
            line = [timing for timing in timings if timing.method == method.name]
            if line and line[-1].seconds * (d / line[-1].d) ** method.expected > arguments.limit:
                print(f"{method.name:12} {d:6}  skipped: over {arguments.limit:g} s", flush=True)
                break
            timings.append(measure(method, d))
            print(f"{method.name:12} {d:6} {timings[-1].seconds:10.4f} s", flush=True)
    load["end"] = os.getloadavg()[0]
    slopes = {method.name: slope([timing for timing in timings if timing.method == method.name]) for method in METHODS}
    print(f"\n{'method':12} {'slope':>6} {'expected':>9}")
    for method in METHODS:
        print(f"{method.name:12} {slopes[method.name]:6.2f} {method.expected:9}")
    verdict = "holds" if slopes["b-kfac"] <= LINEAR_LIMIT else "does not hold"
    print(f"b-kfac at most {LINEAR_LIMIT:g}: {verdict}; load at the end {load['end']:.1f}")
    print(f"written to {write_results(timings, slopes, load)}")


if __name__ == "__main__":
    main()
