"""Whether the ranks find the GPUs that they are to compute on, and whether these reach each other."""

import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from kfdist.config import Config
from kfdist.doctor.finding import Finding, failed, ok, warning


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """What there is of GPUs.

    Attributes:
        names: Those that torch sees.
        built_for: The CUDA that torch was built for; None for a CPU-only torch.
        driver: The driver's version; None without one.
        driver_sees: How many GPUs the driver has.
        nccl: NCCL's version, such as "2.29.7"; None without it.
        apart: Pairs of GPUs that can't reach each other's memory.
    """

    names: tuple[str, ...] = ()
    built_for: str | None = None
    driver: str | None = None
    driver_sees: int = 0
    nccl: str | None = None
    apart: tuple[tuple[int, int], ...] = ()


def check_gpus(config: Config, gpus: Gpus) -> list[Finding]:
    """Checks GPUs, and NCCL where several ranks need it.

    Args:
        config: What is to run, on which device, and with how many ranks.
        gpus: What there is.
    """
    device, ranks = config.run.device, config.cluster.workers
    if device == "cpu":
        return [ok("gpu", 'run.device = "cpu": none is needed')]
    if not gpus.names:
        return [_without(gpus, wanted=device == "cuda")]
    seen = f"{len(gpus.names)} x {gpus.names[0]}, driver {gpus.driver or 'unknown'}, torch for CUDA {gpus.built_for}"
    findings = [ok("gpu", seen)]
    if len(gpus.names) < ranks:
        mend = f"`kfdist train` starts them all here: cluster.workers = {len(gpus.names)}, or torchrun on several nodes"
        findings = [failed("gpu", f"{seen}; {ranks} ranks need one each", mend)]
    if ranks > 1 and gpus.nccl is None:
        findings.append(
            failed("nccl", "this torch has none, and ranks on GPUs need it", "install a torch for CUDA on Linux")
        )
    elif ranks > 1:
        findings.append(ok("nccl", gpus.nccl or ""))
    if ranks > 1 and gpus.apart:
        pairs = ", ".join(f"{one} and {other}" for one, other in gpus.apart[:4])
        mend = "look at `nvidia-smi topo -m`; with IOMMU or ACS on, peer access is off. NCCL goes through the host"
        findings.append(warning("peer access", f"not between GPUs {pairs}: reductions are slower", mend))
    return findings


def _without(gpus: Gpus, *, wanted: bool) -> Finding:
    """Says what is wrong where torch sees no GPU, if anything is."""
    if gpus.driver_sees and gpus.built_for is None:
        seen = f"the driver ({gpus.driver}) has {gpus.driver_sees}, and this torch is for CPUs only"
        mend = "install a torch for CUDA: https://pytorch.org/get-started/locally"
    elif gpus.driver_sees:
        seen = f"the driver ({gpus.driver}) has {gpus.driver_sees}, and torch for CUDA {gpus.built_for} sees none"
        mend = "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough for that CUDA (nvidia-smi)"
    elif wanted:
        seen, mend = "none, and run.device is cuda", 'set run.device = "cpu" or "auto", or mend the driver (nvidia-smi)'
    else:
        return ok("gpu", 'none: run.device = "auto" computes on the CPU')
    return failed("gpu", seen, mend) if wanted else warning("gpu", f"{seen}: ranks would compute on the CPU", mend)


def look_for_gpus() -> Gpus:
    """Asks torch and the driver; takes a while, as torch is imported."""
    import torch

    driver, sees = _ask_driver()
    if not torch.cuda.is_available():
        return Gpus(built_for=torch.version.cuda, driver=driver, driver_sees=sees)
    count = torch.cuda.device_count()
    pairs = [(one, other) for one in range(count) for other in range(one + 1, count)]
    return Gpus(
        names=tuple(torch.cuda.get_device_name(index) for index in range(count)),
        built_for=torch.version.cuda,
        driver=driver,
        driver_sees=sees,
        nccl=_nccl(torch),
        apart=tuple(pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)),
    )


def _nccl(torch: Any) -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):
        return None


def _ask_driver() -> tuple[str | None, int]:
    """Returns the driver's version and its number of GPUs, by nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None, 0
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None, 0
    return (lines[0], len(lines)) if lines else (None, 0)
