"""Jobs with real payloads, and what their results must be."""

import functools
from collections.abc import Mapping

import torch

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import encode_job, run_job
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.links.link import AbstractLink, LinkContext
from kfdist.types import GroupSpec, Job, JobResult, LateBytes
from tests.support.waits import eventually

RUN = "jobs"


@functools.cache
def payload(size: int = 32, *, seed: int = 0, method: str = "kfac", blocks: int = 1) -> bytes:
    """Returns a job on `blocks` layers of `size` inputs and outputs."""
    generator = torch.Generator().manual_seed(seed)

    def covariance() -> torch.Tensor:
        rows = torch.randn(1, 2 * size, size, generator=generator)
        return rows.mT @ rows / (2 * size)

    names = [f"block{index}" for index in range(blocks)]
    return encode_job(
        inverter=make_inverter(method),
        statistics={name: KroneckerFactors(A=covariance(), G=covariance()) for name in names},
        damping=1e-3,
        seeds=dict.fromkeys(names, seed),
        previous={},
        threads=1,
    )


@functools.cache
def result_of(data: bytes) -> bytes:
    """Does a job in this process."""
    torch.set_num_threads(1)
    return run_job(data)


def job(
    group: str = "group",
    *,
    version: int = 0,
    data: bytes | None = None,
    epoch: int = 1,
    deadline_seconds: float = 60.0,
    fingerprint: str = "",
) -> Job:
    data = payload() if data is None else data
    return Job(
        run=RUN,
        epoch=epoch,
        group=group,
        version=version,
        content=LateBytes.of(data),
        deadline_seconds=deadline_seconds,
        fingerprint=fingerprint,
    )


def context(
    *, epoch: int = 1, rank: int = 0, world_size: int = 1, groups: Mapping[str, float] | None = None
) -> LinkContext:
    costs = groups or {"group": 1.0}
    return LinkContext(
        run=RUN,
        epoch=epoch,
        worker_rank=rank,
        world_size=world_size,
        groups=[GroupSpec(name=name, cost=costs[name], position=i, bytes=1) for i, name in enumerate(costs)],
        fingerprint="the ranks'",
    )


def collect(link: AbstractLink, count: int, *, seconds: float = 30.0) -> dict[tuple[str, int], JobResult]:
    """Waits for so many results, and a moment more for one too many; returns them by group and version."""
    results: list[JobResult] = []

    def poll() -> int:
        link.wait(0.1)
        results.extend(link.poll())
        return len(results)

    eventually(poll, lambda found: found >= count, seconds=seconds)
    poll()
    assert len(results) == count
    return {(result.group, result.version): result for result in results}
