"""`kfdist bench traffic`: bytes between ranks for the gradient and for kfdist, counted by the kernel on the wire.

Two gloo ranks live in a network namespace of their own, whose loopback device carries nothing else. Counted are first
some all-reductions of the gradient, then an inverse period of kfdist's steps without them. Nothing that is sent
depends on images' size or the batch, so that both are small; and no gradient is preconditioned, which takes long and
sends nothing.
"""

import multiprocessing
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from kfdist import checks
from kfdist.bench.own_network import enter_own_network, sent_bytes
from kfdist.bench.own_process import answer, in_own_process
from kfdist.bench.results import conditions, table
from kfdist.bench.workloads import WORKLOADS, Batch, mean_cross_entropy
from kfdist.comm.communicator import join_training_group
from kfdist.comm.rendezvous import host_rendezvous
from kfdist.errors import ConfigError, KfdistWarning
from kfdist.models import build_model
from kfdist.policies.staleness import FixedLag
from kfdist.report.drawing import SERIES, drawing
from kfdist.runtime.preconditioner import Preconditioner

RANKS = 2
GOALS = {"rs-kfac": 0.04, "kfac": 0.065}
"""At most how many bytes kfdist adds to the gradient's, on ResNet-50 at periods of 10 and 100."""

MODELS = ("resnet50", *WORKLOADS)
PURPOSES = ("table", "statistics", "snapshots")
"""What kfdist sends between ranks."""

_REDUCTIONS = 3


@dataclass(frozen=True, kw_only=True)
class TrafficSettings:
    """What is measured.

    Attributes:
        model: One of `MODELS`.
        methods: Methods, one after the other; `rs-kfac` has low-rank snapshots and `kfac` dense ones.
        inverse_period: Steps between inversions, ten times those between foldings; so many are counted.
    """

    model: str = "resnet50"
    methods: tuple[str, ...] = ("rs-kfac", "kfac")
    inverse_period: int = 100

    def __post_init__(self) -> None:
        checks.choice("--model", self.model, MODELS)
        if not checks.is_whole(self.inverse_period) or self.inverse_period < 10 or self.inverse_period % 10:
            raise ConfigError(
                f"is {self.inverse_period!r}; a multiple of 10 is needed, since foldings are ten times as frequent",
                path="--inverse-period",
            )

    @property
    def factor_period(self) -> int:
        """Steps between foldings."""
        return self.inverse_period // 10


def measure_traffic(settings: TrafficSettings) -> dict[str, Any]:
    """Counts what two ranks send.

    Raises:
        ConfigError: A method doesn't exist or doesn't take the model.
        RuntimeError: A rank failed.
    """
    found = {}
    for method in settings.methods:
        counts = in_own_process(_count_in_own_network, settings, method)
        counts["kfdist_over_gradient"] = round(counts["kfdist_bytes_a_step"] / counts["gradient_bytes_a_step"], 5)
        found[method] = {**counts, "goal": GOALS.get(method) if settings.model == "resnet50" else None}
    return {
        "bench": "traffic",
        "config": {**asdict(settings), "factor_period": settings.factor_period, "ranks": RANKS, "backend": "gloo"},
        "by_method": found,
    }


def _count_in_own_network(settings: TrafficSettings, method: str) -> dict[str, Any]:
    """Runs in a process of its own: makes the network and the ranks in it, and counts while they work."""
    own = enter_own_network()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous, context = host_rendezvous(RANKS), multiprocessing.get_context("spawn")
    ranks, processes = [], []
    for rank in range(RANKS):
        ours, theirs = context.Pipe()
        os.environ.update(rendezvous.variables(rank))
        process = context.Process(target=_rank, args=(settings, method, theirs))
        process.start()
        theirs.close()
        ranks.append(ours)
        processes.append(process)
    try:
        counts, purposes = [], []
        for steps in (_REDUCTIONS, settings.inverse_period):
            for each in ranks:
                answer(each)  # it is ready, and has nothing under way
            before = sent_bytes()
            for each in ranks:
                each.send(steps)
            purposes = [answer(each) for each in ranks]
            counts.append((sent_bytes() - before) / steps)
        by_purpose = {name: sum(each[name] for each in purposes) / settings.inverse_period for name in PURPOSES}
        return {
            "gradient_bytes_a_step": counts[0],
            "kfdist_bytes_a_step": counts[1],
            "kfdist_bytes_a_step_by_purpose": by_purpose,
            "failed_inversions": max(each["failed"] for each in purposes),
            "counted": "in a network namespace" if own else "on this machine's loopback, whatever else used it",
        }
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(settings: TrafficSettings, method: str, host: Connection) -> None:
    """Does what the host asks for: so many reductions of the gradient, then so many of kfdist's steps."""
    warnings.simplefilter("ignore", KfdistWarning)  # so few examples make bad factors, of the usual size
    torch.set_num_threads(1)
    world = join_training_group(timeout_seconds=300.0)
    try:
        model, batch = _model_and_batch(settings.model, world.rank)
        gradient = torch.zeros(sum(each.numel() for each in model.parameters() if each.requires_grad))
        world.all_reduce_sum_(gradient)
        host.send(None)
        for _ in range(host.recv()):
            world.all_reduce_sum_(gradient)
        host.send(dict.fromkeys(PURPOSES, 0))
        with Preconditioner(
            model,
            method,
            factor_period=settings.factor_period,
            inverse_period=settings.inverse_period,
            kl_clip=None,
            adoption=FixedLag(0),
            digest_period=0,
        ) as preconditioner:
            _backward(model, batch)
            preconditioner.update()  # at the first step, all is due
            before = preconditioner.counters()["bytes"]
            host.send(None)
            for _ in range(host.recv()):
                _backward(model, batch)
                preconditioner.update()
            after = preconditioner.counters()["bytes"]
            failed = preconditioner.counters()["inversions"]["failed"]
            host.send({"failed": failed, **{name: after[name] - before[name] for name in PURPOSES}})
            host.recv()  # until it is killed, so that nothing that ends is counted
    except BaseException as error:
        host.send(error)
    finally:
        host.close()


def _model_and_batch(name: str, seed: int) -> tuple[nn.Module, Batch]:
    if name != "resnet50":
        work = WORKLOADS[name]
        inputs, targets = work.batches(torch.Generator().manual_seed(seed))()
        return work.model(0), (inputs[:4], targets[:4])
    settings = {"architecture": "resnet50"}
    model = build_model("torchvision", settings, example_shape=(3, 224, 224), classes=1000, seed=0)
    generator = torch.Generator().manual_seed(seed)
    return model, (torch.randn(8, 3, 64, 64, generator=generator), torch.arange(8))


def _backward(model: nn.Module, batch: Batch) -> None:
    model.zero_grad()
    mean_cross_entropy(model(batch[0]), batch[1]).backward()


def describe(content: Mapping[str, Any]) -> str:
    """Puts a measurement into words and tables."""
    config = content["config"]
    rows = [
        [
            method,
            each["gradient_bytes_a_step"] / 1e6,
            each["kfdist_bytes_a_step"] / 1e6,
            f"{each['kfdist_over_gradient']:.2%}",
            "-" if each["goal"] is None else f"{each['goal']:.1%}",
            *(each["kfdist_bytes_a_step_by_purpose"][purpose] / 1e6 for purpose in PURPOSES),
        ]
        for method, each in content["by_method"].items()
    ]
    counted = {each["counted"] for each in content["by_method"].values()}
    failed = ", ".join(f"{name} {each['failed_inversions']}" for name, each in content["by_method"].items())
    head = ["MB a step, all ranks", "gradient", "kfdist", "share", "goal", *PURPOSES]
    return "\n".join(
        [
            f"{config['model']} over {config['ranks']} ranks of {config['backend']}, periods {config['factor_period']} "
            f"and {config['inverse_period']}; counted {' and '.join(sorted(counted))}",
            "",
            table(head, rows),
            "gradient and kfdist are the wire's, with TCP's headers; purposes are what ranks contribute",
            f"inversions that failed, whose snapshots have no bytes: {failed}",
            conditions(content),
        ]
    )


def plot(content: Mapping[str, Any]) -> str:
    """Draws what kfdist sends, by purpose, as shares of the gradient's bytes, beside the goals."""
    by_method = content["by_method"]
    with drawing(1.5 + 0.5 * len(by_method)) as drawn:
        (axes,) = drawn.axes
        left = dict.fromkeys(by_method, 0.0)
        for number, purpose in enumerate(PURPOSES):
            shares = {
                name: 100 * each["kfdist_bytes_a_step_by_purpose"][purpose] / each["gradient_bytes_a_step"]
                for name, each in by_method.items()
            }
            starts = list(left.values())
            axes.barh(list(shares), list(shares.values()), left=starts, color=SERIES[number], height=0.6, label=purpose)
            left = {name: left[name] + share for name, share in shares.items()}
        for number, each in enumerate(by_method.values()):
            if each["goal"] is not None:
                axes.plot([100 * each["goal"]] * 2, [number - 0.4, number + 0.4], color=SERIES[6], linestyle="--")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("% of the gradient's bytes; dashed: at most")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return drawn.svg
