"""Checks what a user passes to `kfdist.Preconditioner`, and makes its parts."""

import torch

from kfdist.comm.communicator import Communicator
from kfdist.comm.together import require_equal
from kfdist.curvature.fingerprint import fingerprint
from kfdist.errors import EnvironmentFault


def inverting_fingerprint(training: Communicator, device: torch.device) -> str:
    """Checks that the ranks agree on what their numbers depend on; returns the same of whoever inverts for them.

    Statistics reach the inverters in host memory, and both the local link and the owners invert there, whatever the
    ranks train on.

    Raises:
        EnvironmentFault: The ranks differ; on all of them.
    """
    require_equal(
        training,
        {"fingerprint": fingerprint(device.type, torch.get_num_threads())},
        lambda _, listed: EnvironmentFault(
            f"the ranks differ in what their numbers depend on ({listed}); use the same hardware, thread count "
            "(torch.set_num_threads) and library versions on all ranks"
        ),
    )
    return fingerprint("cpu", torch.get_num_threads())
