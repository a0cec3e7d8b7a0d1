"""What the last bits of a result depend on besides its inputs."""

import hashlib

import torch

from kfdist.system.provenance import processor_field


def fingerprint(device: torch.device | str, threads: int) -> str:
    """Describes device, CPU capability, thread count and library versions in one line.

    Two processes with equal fingerprints get equal bytes from `kfdist.curvature.jobs.run_job`. On a CPU the last bits
    of eigendecompositions, sums and convolution gradients depend on the vector instructions and on the thread count;
    the vendor counts because MKL chooses its kernels by it.

    Args:
        device: Where inversions run.
        threads: CPU threads they run with.

    Returns:
        Fields separated by semicolons, such as
        "cpu;AVX512;vendor=GenuineIntel;threads=1;torch=2.13.0+cpu;build=1f2e3d4c".
    """
    device = torch.device(device)
    fields = [
        device.type,
        torch.backends.cpu.get_cpu_capability(),
        f"vendor={processor_field('vendor_id', 'CPU implementer') or 'unknown'}",
        f"threads={threads}",
        f"torch={torch.__version__}",
        # The same version comes with different BLAS and LAPACK; the build's own description tells them apart.
        f"build={hashlib.sha256(torch.__config__.show().encode()).hexdigest()[:8]}",
        f"matmul={torch.get_float32_matmul_precision()}",
    ]
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fields += [torch.cuda.get_device_name(device), f"sm={major}{minor}", f"cuda={torch.version.cuda}"]
    return ";".join(fields)
