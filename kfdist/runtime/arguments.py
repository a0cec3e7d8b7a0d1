"""Checks what a user passes to `kfdist.Preconditioner`, and makes its parts."""

from collections.abc import Iterable

import torch
from torch import nn

from kfdist import checks
from kfdist.capture.requests import FISHERS
from kfdist.comm.communicator import Communicator
from kfdist.curvature.auto import MeasuredCosts, measure_costs
from kfdist.curvature.averages import WeightedSums, sum_shapes
from kfdist.curvature.blocks import Block
from kfdist.curvature.fingerprint import fingerprint
from kfdist.curvature.inverter import Coupling
from kfdist.errors import ConfigError, EnvironmentFault, ModelChanged
from kfdist.links.link import AbstractLink
from kfdist.links.local import LocalLink
from kfdist.policies.staleness import StalenessPolicy
from kfdist.runtime.apply.rates import Scalar
from kfdist.runtime.invert.service import Service
from kfdist.runtime.plan.groups import BlockGroup, find_layer
from kfdist.runtime.settings import FixedLag
from kfdist.types import BlockName


def check_block(model: nn.Module, block: Block, device: torch.device) -> None:
    """Refuses a layer that was frozen, replaced, resized or moved since its block was made, by `ModelChanged`.

    Args:
        model: The model as it is now.
        block: One of its blocks.
        device: Where the model was when the blocks were made.
    """
    module, parameters = find_layer(model, block.name), block.parameters()
    change = None
    if module is not block.module:
        change = "replaced or removed"
    elif any(getattr(module, name) is not known for name, known in zip(("weight", "bias"), parameters, strict=False)):
        change = "given other parameters (replaced or resized)"
    elif not all(parameter.requires_grad for parameter in parameters):
        change = "frozen"
    elif block.resized:
        change = "resized"
    elif any(parameter.device != device for parameter in parameters):
        change = f"moved from {device} to {parameters[0].device}"
    if change is not None:
        raise ModelChanged(
            f"layer {block.name!r} was {change} after the Preconditioner was made; make a new Preconditioner after "
            "changing the model"
        )


def device_of(blocks: Iterable[Block]) -> torch.device:
    """Returns where all blocks are. Raises `ConfigError` where they are on several devices."""
    devices = {parameter.device: block.name for block in blocks for parameter in block.parameters()}
    if len(devices) > 1:
        listed = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ConfigError(f"the model's layers are on several devices ({listed}); one device per process is needed")
    return next(iter(devices))


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
    own = fingerprint(device.type, torch.get_num_threads())
    everyone = training.all_gather_json(own)
    if any(other != own for other in everyone):
        listed = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(everyone))
        raise EnvironmentFault(
            f"the ranks differ in what their numbers depend on ({listed}); use the same hardware, thread count "
            "(torch.set_num_threads) and library versions on all ranks"
        )
    return fingerprint("cpu", torch.get_num_threads())


def agreed_costs(training: Communicator) -> MeasuredCosts:
    """Returns what inversions cost on rank 0's machine, on all ranks: they have to choose alike."""
    measured = measure_costs().to_json() if training.rank == 0 else None
    return MeasuredCosts.from_json(training.broadcast_json(measured))


def make_link(link: Service | AbstractLink | None) -> AbstractLink:
    """Makes the link a user asked for: the local one by default."""
    if link is None:
        return LocalLink()
    if isinstance(link, AbstractLink):
        return link
    from kfdist.links.rank.remote import RemoteLink  # only runs with a service need it

    return RemoteLink(link.address)


def empty_sums(groups: Iterable[BlockGroup], device: torch.device) -> dict[BlockName, WeightedSums]:
    """Makes all blocks' sums: float64 for float64 parameters, else float32."""
    sums = {}
    for group in groups:
        chained = group.inverter.coupling is Coupling.CHAIN
        for position, block in enumerate(group.blocks):
            following = group.blocks[position + 1].shape if chained and position + 1 < len(group.blocks) else None
            shapes = sum_shapes(block.shape, group.needs[block.name], following=following, members=len(group.blocks))
            dtype = torch.float64 if block.parameters()[0].dtype == torch.float64 else torch.float32
            sums[block.name] = WeightedSums.zeros(shapes, dtype=dtype, device=device)
    return sums


def check_fisher(fisher: str, groups: Iterable[BlockGroup]) -> None:
    """Refuses methods that take single examples' rows together with the exact Fisher, which sums over all targets."""
    if fisher != "exact":
        return
    for group in groups:
        for needs in group.needs.values():
            if needs.increments or needs.samples is not None or needs.calibration is not None:
                raise ConfigError(
                    f"{group.inverter.name} takes rows of single examples, which fisher='exact' doesn't have; use "
                    "fisher='mc' or 'empirical'",
                    path="fisher",
                )


def check_applied_rows(
    groups: Iterable[BlockGroup], *, world_size: int, fisher: str, grad_scaler: torch.amp.GradScaler | None
) -> None:
    """Refuses to multiply inverses onto rows where the gradient isn't the batch's own, by `ConfigError`."""
    group = next((group for group in groups if any(needs.applied_rows for needs in group.needs.values())), None)
    if group is None:
        return
    against = None
    if world_size > 1:
        against = f"the gradients of {world_size} ranks are averaged"
    elif fisher != "empirical":
        against = f"fisher = {fisher!r} measures other gradients than the loss's own"
    elif grad_scaler is not None and grad_scaler.is_enabled():
        against = "a GradScaler scales the gradients"
    if against is not None:
        raise ConfigError(
            f'apply_to = "rows" of {group.inverter.name} (block {group.name!r}) needs the raw gradient of one batch, '
            f'but {against}; use apply_to = "gradient"',
            path="method",
        )
