"""GPUs that are missing, too few, unknown to this torch, or that don't reach each other."""

import pytest

from kfdist.config import load_config
from kfdist.doctor.finding import Finding, Verdict
from kfdist.doctor.gpu_checks import Gpus, check_gpus, look_for_gpus

TWO = Gpus(names=("H200", "H200"), built_for="13.0", driver="580.1", driver_sees=2, nccl="2.29.7")


def _found(gpus: Gpus, *overrides: str) -> dict[str, Finding]:
    return {each.check: each for each in check_gpus(load_config(None, environment={}, overrides=overrides), gpus)}


def test_two_ranks_on_two_gpus() -> None:
    assert {check: each.verdict for check, each in _found(TWO).items()} == {"gpu": Verdict.OK, "nccl": Verdict.OK}


@pytest.mark.parametrize(
    ("gpus", "device", "verdict", "words"),
    [
        (Gpus(), "cpu", Verdict.OK, "none is needed"),
        (Gpus(), "auto", Verdict.OK, "computes on the CPU"),
        (Gpus(), "cuda", Verdict.FAILED, "run.device is cuda"),
        (Gpus(driver="580.1", driver_sees=1), "auto", Verdict.WARNING, "this torch is for CPUs only"),
        (Gpus(driver="580.1", driver_sees=1), "cuda", Verdict.FAILED, "this torch is for CPUs only"),
        (Gpus(driver="580.1", driver_sees=1, built_for="13.0"), "cuda", Verdict.FAILED, "sees none"),
    ],
)
def test_without_gpus(gpus: Gpus, device: str, verdict: Verdict, words: str) -> None:
    found = _found(gpus, f'run.device="{device}"')["gpu"]
    assert (found.verdict, words in found.seen) == (verdict, True), found
    assert bool(found.mend) == (verdict is not Verdict.OK)


def test_more_ranks_than_gpus_and_none_that_reaches_the_other() -> None:
    gpus = Gpus(names=TWO.names, built_for="13.0", driver="580.1", driver_sees=2, apart=((0, 1),))
    found = _found(gpus, "cluster.workers=4")
    assert {check: each.verdict for check, each in found.items()} == {
        "gpu": Verdict.FAILED,
        "nccl": Verdict.FAILED,
        "peer access": Verdict.WARNING,
    }
    assert "GPUs 0 and 1" in found["peer access"].seen


def test_what_is_here_is_described() -> None:
    import torch

    found = look_for_gpus()
    assert len(found.names) == torch.cuda.device_count()
    assert found.built_for == torch.version.cuda
