"""Checks what a user passes to `kfdist.Preconditioner`, and makes its parts."""

import torch

from kfdist import checks
from kfdist.capture.requests import FISHERS
from kfdist.comm.communicator import Communicator
from kfdist.comm.together import require_equal
from kfdist.curvature.fingerprint import fingerprint
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.policies.staleness import StalenessPolicy
from kfdist.runtime.apply.rates import Scalar
from kfdist.runtime.settings import FixedLag


def check_numbers(
    *,
    damping: Scalar,
    ema_decay: float,
    fisher: str,
    kl_clip: float | None,
    wait_limit: float,
    digest_period: int,
) -> None:
    """Refuses values out of range by `ConfigError`."""
    if not callable(damping):
        checks.number("damping", damping, above=0, hint="or a callable of the step")
    checks.number("ema_decay", ema_decay, least=0, below=1)
    checks.choice("fisher", fisher, FISHERS)
    if kl_clip is not None:
        checks.number("kl_clip", kl_clip, above=0, hint="or None, which turns the clip off")
    checks.number("wait_limit_seconds", wait_limit, above=0, finite=False)
    checks.count("digest_period", digest_period, least=0, hint="steps between two digests; 0 for none")


def lag_of(adoption: str | FixedLag) -> int | None:
    """Returns the steps to adoption; None for "asap"."""
    if isinstance(adoption, FixedLag):
        return checks.count("FixedLag.lag", adoption.lag, least=0, hint="steps from statistics to adoption")
    if adoption == "asap":
        return None
    raise ConfigError(f"adoption is {adoption!r}; 'asap' or kfdist.FixedLag(k) is needed")


def checked_staleness(policy: StalenessPolicy | None, lag: int | None, inverse_period: int) -> StalenessPolicy:
    """Returns the policy, an idle one by default, if it fits the adoption and the period."""
    policy = policy or StalenessPolicy()
    policy.check(inverse_period=inverse_period, lag=lag)
    return policy


def constant(value: float, step: int) -> float:
    """The schedule of a number: itself at every step."""
    del step
    return value


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
