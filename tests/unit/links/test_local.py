"""The link whose inverter is a thread of this process."""

import time
import weakref

import torch

from kfdist.curvature.inverters import make_inverter
from kfdist.curvature.jobs import encode_job
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.links.link import LinkContext
from kfdist.links.local import LocalLink
from kfdist.types import Job, LateBytes


def test_a_job_that_is_done_is_let_go():
    """Its bytes are half a factor: a wide layer's would stay for the hundred steps until the next job."""
    factors = KroneckerFactors(A=torch.eye(3)[None], G=torch.eye(2)[None])
    payload = encode_job(
        inverter=make_inverter("kfac"), statistics={"b": factors}, damping=0.1, seeds={"b": 1}, previous={}, threads=1
    )
    job = Job(run="r", epoch=0, group="b", version=0, content=LateBytes.of(payload), deadline_seconds=9, fingerprint="")
    link, kept = LocalLink(), weakref.ref(job)
    link.start(LinkContext(run="r", epoch=0, worker_rank=0, world_size=1, groups=(), fingerprint=""))
    link.submit(job)
    del job
    link.wait(30)
    assert [result.group for result in link.poll()] == ["b"]
    deadline = time.monotonic() + 30
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert kept() is None
    link.close()
