"""`kfdist bench memory`: the most memory that a rank takes, beside what it has to; and whether it grows.

A rank trains in a process of its own, first by SGD alone and then behind a preconditioner whose inversions an owner
does. The kernel tells the most that the process had resident: by how much it rises is kfdist's, activations being in
both. It may be the statistics, two snapshots, and a tenth of these, the model and the optimizer's state together. Then
a small model trains long, inverting at every fifth step, and the processes' memory is read on the way.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist import checks
from kfdist.bench.own_process import in_own_process
from kfdist.bench.results import conditions, table
from kfdist.bench.served import served
from kfdist.bench.trainee import Trainee
from kfdist.bench.workloads import WORKLOADS
from kfdist.links.rank.remote import RemoteLink
from kfdist.report.drawing import SERIES, drawing
from kfdist.runtime.invert.service import Service
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.torch_internals import storage_id, tree_leaves
from kfdist.wire.records import tensor_fields

MARGIN = 0.1
_WARM = 3
_READINGS = 20


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What is measured.

    Attributes:
        model: A key of `WORKLOADS`.
        method: The preconditioner's; everything else is its default.
        steps: Of the rank; all blocks are inverted at the first, and each once more in an inverse period.
        long_steps: Of the small model.
    """

    model: str = "resnet18"
    method: str = "rs-kfac"
    steps: int = 120
    long_steps: int = 2000

    def __post_init__(self) -> None:
        checks.choice("--model", self.model, WORKLOADS)
        checks.count("--steps", self.steps, least=1)
        checks.count("--long-steps", self.long_steps, least=_READINGS)


def measure_memory(settings: MemorySettings) -> dict[str, Any]:
    """Trains in processes of their own, and returns what they took.

    Raises:
        ConfigError: The method doesn't exist or doesn't take the model.
        EnvironmentFault: The service doesn't start.
    """
    with served() as running:
        rank = in_own_process(_rank, settings, running.service)
    with served(run="long") as running:
        grown = in_own_process(train_long, settings, running.service)
    peak, parts = rank["peak_bytes"], rank["parts"]
    extra = {name: size - peak["sgd"] for name, size in peak.items() if name != "sgd"}
    allowed = allowed_bytes(parts)
    return {
        "bench": "memory",
        "config": {**asdict(settings), "workload": WORKLOADS[settings.model].title, "owners": 1},
        **rank,
        "kfdist_bytes": extra,
        "allowed_bytes": allowed,
        "kfdist_over_allowed": {name: round(size / allowed, 4) for name, size in extra.items()},
        "long_run": grown,
    }


def allowed_bytes(parts: Mapping[str, int]) -> int:
    """Returns what kfdist may add to a rank.

    Args:
        parts: Bytes of "parameters", "optimizer", "statistics" and "snapshots_twice".
    """
    return parts["statistics"] + parts["snapshots_twice"] + round(MARGIN * sum(parts.values()))


def resident(pid: int | str, what: str) -> int:
    """Returns bytes of a process that the kernel knows of, such as "VmHWM" or "RssAnon"; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:")), 0)


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages that tensors have between them."""
    storages = {storage_id(each.untyped_storage()): each.untyped_storage().nbytes() for each in tensors}
    return sum(storages.values())


def _rank(settings: MemorySettings, service: Service) -> dict[str, Any]:
    """Trains a rank, and returns the most that it had resident without kfdist and with it, and what has to be there."""
    workload, link = WORKLOADS[settings.model], RemoteLink(service.address)
    trainee = Trainee(workload, None, 0)
    for _ in range(_WARM):
        trainee.step()
    peak = {"sgd": resident("self", "VmHWM")}
    own = trainee.preconditioner = Preconditioner(trainee.model, settings.method, lr=workload.lr, link=link)
    private, shared = [], []
    for step in range(settings.steps):
        trainee.step()
        if step == 0:
            peak["kfdist, first step"] = resident("self", "VmHWM")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel begins anew
        private.append(resident(link.courier_pid, "RssAnon"))
        shared.append(resident(link.courier_pid, "RssShmem"))
    peak["kfdist, later"] = resident("self", "VmHWM")
    sums = [each for of_block in own.pipeline.reducer.sums.values() for each in of_block.sums.values()]
    sums += [each for of_block in own.pipeline.reducer.moments.sums.values() for each in of_block.tensors()]
    snapshots = [each for inverse in own.inverses().values() for each in tensor_fields(inverse).values()]
    state = [each for of_one in trainee.optimizer.state.values() for each in tree_leaves(of_one)]
    own.close()
    return {
        "peak_bytes": peak,
        "parts": {
            "parameters": distinct_bytes(own.model.parameters()),
            "optimizer": distinct_bytes(each for each in state if isinstance(each, Tensor)),
            "statistics": distinct_bytes(sums),
            "snapshots_twice": 2 * distinct_bytes(snapshots),
        },
        "courier": {
            "private_bytes_at_first": private[0],
            "largest_private_bytes": max(private),
            "largest_shared_bytes": max(shared),
            "largest_job_bytes": max(group.spec.bytes for group in own.groups),
        },
    }


def train_long(settings: MemorySettings, service: Service) -> dict[str, Any]:
    """Trains a small model for long, and reads what the rank and its courier have on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(64, 64), torch.randint(0, 10, (64,))
    link = RemoteLink(service.address)
    readings: dict[str, list[int]] = {name: [] for name in ("steps", "rank_bytes", "courier_bytes", "objects")}
    every = settings.long_steps // _READINGS
    with Preconditioner(model, settings.method, factor_period=1, inverse_period=5, lr=0.01, link=link) as own:
        for step in itertools.count(1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            own.step()
            optimizer.step()
            if step % every == 0:
                gc.collect()
                readings["steps"].append(step)
                readings["rank_bytes"].append(resident("self", "RssAnon"))
                readings["courier_bytes"].append(resident(link.courier_pid, "RssAnon"))
                readings["objects"].append(len(gc.get_objects()))
            if step >= settings.long_steps:
                break
            time.sleep(0.001)  # the owner keeps up, so that results come and go all the time
        inversions = own.counters()["inversions"]["completed"]
    return {
        **readings,
        "inversions": inversions,
        **{f"{name}_a_1000_steps": round(growth(readings["steps"], readings[name])) for name in list(readings)[1:]},
    }


def growth(steps: list[int], values: list[int]) -> float:
    """Returns by how much values rise in a thousand steps, by least squares over the second half."""
    half = len(steps) // 2
    return 1000 * statistics.linear_regression(steps[half:], values[half:]).slope


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into words and tables."""
    config, parts, courier, long = (content[name] for name in ("config", "parts", "courier", "long_run"))
    mega = {name: size / 1e6 for name, size in parts.items()}
    lines = [
        *([f"a rank's peak: {name}", size / 1e6] for name, size in content["peak_bytes"].items()),
        *([f"more than SGD's: {name}", size / 1e6] for name, size in content["kfdist_bytes"].items()),
        ["allowed", content["allowed_bytes"] / 1e6],
        *([f"  {name.replace('_', ' ')}", size] for name, size in mega.items()),
        ["courier, private, at first", courier["private_bytes_at_first"] / 1e6],
        ["courier, private, at most", courier["largest_private_bytes"] / 1e6],
        ["courier, shared with the rank, at most", courier["largest_shared_bytes"] / 1e6],
        ["the largest job", courier["largest_job_bytes"] / 1e6],
    ]
    return "\n".join(
        [
            f"{config['workload']}; {config['method']}, {config['steps']} steps",
            "",
            table(["MB", ""], lines),
            "of what is allowed (statistics, two snapshots, and a tenth of the four parts) it takes "
            + ", ".join(f"{share:.2f} ({name})" for name, share in content["kfdist_over_allowed"].items()),
            "",
            f"{long['steps'][-1]} steps of a small model, {long['inversions']} inversions; in a thousand steps of the "
            f"second half the rank grows by {long['rank_bytes_a_1000_steps'] / 1e3:.0f} kB, its courier by "
            f"{long['courier_bytes_a_1000_steps'] / 1e3:.0f} kB, Python's objects by {long['objects_a_1000_steps']}",
            conditions(content),
        ]
    )


def plot(content: Mapping[str, Any]) -> str:
    """Draws the parts beside what kfdist takes, and the memory of the long run."""
    parts, long = content["parts"], content["long_run"]
    with drawing(4.2, rows=2) as drawn:
        above, below = drawn.axes
        shown = {name: parts[name] for name in ("statistics", "snapshots_twice")}
        shown["a tenth of all"] = content["allowed_bytes"] - sum(shown.values())
        left = 0.0
        for number, (name, size) in enumerate(shown.items()):
            label = name.replace("_", " ")
            above.barh(["allowed"], [size / 1e6], left=left, color=SERIES[number + 1], height=0.6, label=label)
            left += size / 1e6
        for name, size in content["kfdist_bytes"].items():
            above.barh([name], [size / 1e6], color=SERIES[0], height=0.6)
        above.set_xlabel("MB beside SGD's peak")
        above.grid(visible=False, axis="y")
        for number, name in enumerate(("rank", "courier")):
            values = [size / 1e6 for size in long[f"{name}_bytes"]]
            below.plot(long["steps"], values, color=SERIES[number], label=name)
        below.set_ylim(bottom=0)
        below.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        below.set_xlabel("step of a small model")
        below.set_ylabel("MB, private")
        below.legend()
        drawn.figure.subplots_adjust(left=0.26, right=0.97, top=0.88, bottom=0.1, hspace=0.45)
        drawn.figure.legend(*above.get_legend_handles_labels(), loc="upper center", ncols=3)
    return drawn.svg
