r"""Products of the exact Fisher with a direction, through the network's output (algorithms.md 1.2, step 4).

With the network's output z, its Jacobian J with respect to the parameters and the loss L(z), the mean over the batch as
torch computes it, u^T F v = (J u)^T H (J v), H = d^2 L / dz^2. For the losses that are negative log-likelihoods, H is
the Fisher of the predicted distribution: diag(p) - p p^T for cross-entropy (whatever the labels and their smoothing;
0 for ignored ones), 2/C for the mean squared error over C outputs, p (1 - p) for binary cross-entropy on logits, each
over the number of terms that the mean counts. H is never written down: J u comes from one pass in forward mode, H J u
from differentiating the loss twice with respect to its argument.

Source: Schraudolph (2002) for the product; Pearlmutter's and the "double backward" trick for J u without forward mode.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import stateless

from kfdist.errors import KfdistError

Differentiable = Callable[[], tuple[Tensor, Tensor]]
"""Runs the model and returns (output, loss), with their graph."""


class Differentiation(StrEnum):
    """How J u is computed."""

    FORWARD = "forward"
    """Forward-mode automatic differentiation: about the cost of two forwards."""
    DOUBLE_BACKWARD = "double_backward"
    """The derivative of the backward pass, which is linear in its argument: about the cost of three backwards."""


class NoForwardDerivative(KfdistError):
    """An operator of the model has no derivative in forward mode."""


@dataclass(frozen=True)
class OutputProduct:
    """A direction seen at the output.

    Attributes:
        change: J u, in the output's shape.
        curvature: H J u, the same shape.
    """

    change: Tensor
    curvature: Tensor


def output_product(
    run: Differentiable, model: nn.Module, direction: Mapping[nn.Parameter, Tensor], how: Differentiation
) -> OutputProduct:
    """Computes J u and H J u of a direction u in the space of the parameters.

    Args:
        run: Runs the model; called once.
        model: The module whose parameters are moved.
        direction: u, per parameter; parameters that are left out don't move.
        how: How J u is computed.

    Raises:
        NoForwardDerivative: Forward mode was asked for and an operator doesn't have it.
        KfdistError: The loss does not depend on the output.
    """
    # The fused attention kernels have neither forward mode nor a double backward; the plain formula has both.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if how is Differentiation.FORWARD:
            output, loss, change = _forward_mode(run, model, direction)
        else:
            output, loss, change = _double_backward(run, direction)
        return OutputProduct(change, _hessian_product(output, loss, change))


def _forward_mode(
    run: Differentiable, model: nn.Module, direction: Mapping[nn.Parameter, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    with forward_ad.dual_level():
        moving = {id(parameter): forward_ad.make_dual(parameter, u) for parameter, u in direction.items()}
        # Every name of a tied parameter has to be replaced, or part of its derivative is lost.
        named = dict(model.named_parameters(remove_duplicate=False))
        swapped = {name: moving[id(parameter)] for name, parameter in named.items() if id(parameter) in moving}
        try:
            with stateless._reparametrize_module(model, swapped):
                output, loss = run()
        except (NotImplementedError, RuntimeError) as error:
            if _lacks_forward_mode(error):
                raise NoForwardDerivative(str(error)) from error
            raise
        primal, tangent = forward_ad.unpack_dual(output)
        change = torch.zeros_like(primal) if tangent is None else tangent
        return output, loss, change.detach().clone()


def _lacks_forward_mode(error: Exception) -> bool:
    """Recognises torch's messages for an operator, or an autograd.Function, without a forward derivative."""
    text = str(error).lower()
    return any(mark in text for mark in ("forward ad", "forward-ad", "forward mode", "forward-mode", "jvp"))


def _double_backward(run: Differentiable, direction: Mapping[nn.Parameter, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """J u = d/dw (J^T w)^T u, for any w: the backward pass is linear in its argument."""
    output, loss = run()
    parameters = list(direction)
    w = torch.zeros_like(output, requires_grad=True)
    rows = torch.autograd.grad(output, parameters, w, create_graph=True, allow_unused=True)
    used = [(row, direction[p]) for row, p in zip(rows, parameters, strict=True) if row is not None]
    if not any(row.requires_grad for row, _ in used):
        return output, loss, torch.zeros_like(output).detach()
    moving = [(row, u) for row, u in used if row.requires_grad]
    (change,) = torch.autograd.grad([row for row, _ in moving], w, [u for _, u in moving])
    return output, loss, change.detach()


def _hessian_product(output: Tensor, loss: Tensor, change: Tensor) -> Tensor:
    """Differentiates the loss twice with respect to the output, along `change`."""
    (slope,) = torch.autograd.grad(loss, output, create_graph=True, allow_unused=True)
    if slope is None:
        raise KfdistError(
            "the closure's loss does not depend on the output it returned; return the very tensor that the loss was "
            "computed from"
        )
    if not slope.requires_grad:  # linear in the output
        return torch.zeros_like(change)
    (product,) = torch.autograd.grad(slope, output, change, allow_unused=True)
    return torch.zeros_like(change) if product is None else product.detach()
