r"""Products of the exact Fisher with a direction, through the network's output (algorithms.md 1.2, step 4).

With the network's output z, its Jacobian J with respect to the parameters and the loss L(z), the mean over the batch as
torch computes it, u^T F v = (J u)^T H (J v), H = d^2 L / dz^2. For the losses that are negative log-likelihoods, H is
the Fisher of the predicted distribution: diag(p) - p p^T for cross-entropy (whatever the labels and their smoothing;
0 for ignored ones), 2/C for the mean squared error over C outputs, p (1 - p) for binary cross-entropy on logits, each
over the number of terms that the mean counts. H is never formed: H v comes from differentiating the loss twice with
respect to the output, and J u from a pass in forward mode, one for all directions where that is possible, or else from
differentiating the backward pass.

Source: Schraudolph (2002) for the product; Pearlmutter's and the "double backward" trick for J u without forward mode.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kfdist.errors import KfdistError
from kfdist.torch_internals import with_tensors_for_parameters, without_slow_loops

Differentiable = Callable[[], tuple[Tensor, Tensor]]
"""Runs the model and returns (output, loss), in the gradient mode of the caller."""


class Differentiation(StrEnum):
    """How J u is computed."""

    FORWARD = "forward"
    """Forward-mode automatic differentiation: about the cost of three forwards, one of them for the outputs."""
    DOUBLE_BACKWARD = "double_backward"
    """The derivative of the backward pass, which is linear in its argument: one more backward, and its graph."""


class NoForwardDerivative(KfdistError):
    """An operator of the model has no derivative in forward mode."""


class NotTogether(KfdistError):
    """Something in the model or the loss can't run with the tangents of several directions at once."""


@dataclass(frozen=True)
class OutputProduct:
    """A direction seen at the output.

    Attributes:
        change: J u, in the output's shape.
        curvature: H J u, the same shape.
    """

    change: Tensor
    curvature: Tensor


class OutputFisher:
    """The Fisher at the present parameters and batch, as products with directions.

    It keeps the graph of one forward alive, with those of the tangents that it was made together with.

    Args:
        run: Runs the model, always on the same data; called once here, and once for each direction in forward mode.
        model: The module whose parameters move.
        around: What each run is inside of.
        together: Directions that are wanted, all of the same parameters, for `products_together`.

    Raises:
        KfdistError: The loss does not depend on the output.
        NotTogether: Directions were given, and the run failed with them; without them it may not.
    """

    def __init__(
        self,
        run: Differentiable,
        model: nn.Module,
        *,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        together: Sequence[Mapping[nn.Parameter, Tensor]] = (),
    ) -> None:
        self._run = run
        self._model = model
        self._around = around
        self._rows: tuple[Tensor, dict[nn.Parameter, Tensor]] | None = None
        self._changes: Sequence[Tensor] = ()
        with torch.enable_grad(), _plain_attention(), around():
            if together:
                self._changes, self._output, loss = self._linearised_with(together)
            else:
                self._output, loss = run()
            (slope,) = torch.autograd.grad(loss, self._output, create_graph=True, allow_unused=True)
        if slope is None:
            raise KfdistError(
                "the closure's loss does not depend on the output it returned; return the tensor that the loss was "
                "computed from"
            )
        self._slope = slope

    def along(self, direction: Mapping[nn.Parameter, Tensor], how: Differentiation) -> OutputProduct:
        """Computes J u and H J u of a direction u in the space of the parameters.

        Args:
            direction: u, per parameter; parameters left out don't move.
            how: How J u is computed.

        Raises:
            NoForwardDerivative: `how` is forward mode, and an operator has no derivative in it.
        """
        with _plain_attention():
            forward = how is Differentiation.FORWARD
            change = self._forward_mode(direction) if forward else self._double_backward(direction)
        return OutputProduct(change, self._hessian_product(change))

    def products_together(self) -> list[OutputProduct]:
        """Returns J u and H J u of the directions that it was made with."""
        return [OutputProduct(change, self._hessian_product(change)) for change in self._changes]

    def _linearised_with(
        self, directions: Sequence[Mapping[nn.Parameter, Tensor]]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Runs the model once, with all tangents on it; returns J u of each direction, the output and the loss.

        Only the tangents have a dimension more. What they are made of, the output and the loss are computed once.
        """
        parameters = list(directions[0])
        stacked = [torch.stack([u[p] for u in directions]) for p in parameters]

        def run(*tensors: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            swapped = self._by_name(dict(zip(parameters, tensors, strict=True))) | self._buffers()
            with with_tensors_for_parameters(self._model, swapped):
                output, loss = self._run()
            return output, (output, loss)

        def along(*tangents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            returned: Any = torch.func.jvp(run, tuple(parameters), tangents, has_aux=True)
            _, change, (output, loss) = returned
            return change, output, loss

        try:
            with without_slow_loops():
                out_dims: Any = (0, None, None)  # torch declares them as numbers
                changes, output, loss = torch.func.vmap(along, out_dims=out_dims, randomness="same")(*stacked)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise NotTogether(str(error)) from error
        return changes.detach().unbind(), output, loss

    def _by_name(self, tensors: Mapping[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """Returns the tensors by each name of their parameters: a tied one has several, and all must be replaced."""
        by_id = {id(parameter): tensor for parameter, tensor in tensors.items()}
        named = self._model.named_parameters(remove_duplicate=False)
        return {name: by_id[id(parameter)] for name, parameter in named if id(parameter) in by_id}

    def _buffers(self) -> dict[str, Tensor]:
        """Returns copies of the buffers by name: what was made outside of `torch.func.jvp` can't be changed inside."""
        named = list(self._model.named_buffers(remove_duplicate=False))
        copies = {id(buffer): buffer.clone() for _, buffer in named}
        return {name: copies[id(buffer)] for name, buffer in named}

    def _forward_mode(self, direction: Mapping[nn.Parameter, Tensor]) -> Tensor:
        # Without a graph: that of the tangents would cost twice the memory of the training forward's.
        with torch.no_grad(), forward_ad.dual_level():
            swapped = self._by_name({p: forward_ad.make_dual(p.detach(), u) for p, u in direction.items()})
            try:
                with self._around(), with_tensors_for_parameters(self._model, swapped):
                    output, _ = self._run()
            except (NotImplementedError, RuntimeError) as error:
                if _lacks_forward_mode(error):
                    raise NoForwardDerivative(str(error)) from error
                raise
            tangent = forward_ad.unpack_dual(output).tangent
            return torch.zeros_like(self._output) if tangent is None else tangent.clone()

    def _double_backward(self, direction: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Computes J u = d/dw (J^T w)^T u, for any w: the backward pass is linear in its argument."""
        if self._rows is None:
            self._rows = self._backward_of_a_variable(list(direction))
        w, rows = self._rows
        moving = {p: u for p, u in direction.items() if p in rows}
        if not moving:
            return torch.zeros_like(self._output)
        (change,) = torch.autograd.grad([rows[p] for p in moving], w, list(moving.values()), retain_graph=True)
        return change.detach()

    def _backward_of_a_variable(self, parameters: list[nn.Parameter]) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
        """Returns w, and J^T w with its graph for each parameter that the output depends on."""
        with torch.enable_grad():
            w = torch.zeros_like(self._output, requires_grad=True)
            rows = torch.autograd.grad(
                self._output, parameters, w, create_graph=True, retain_graph=True, allow_unused=True
            )
        return w, {p: row for p, row in zip(parameters, rows, strict=True) if row is not None and row.requires_grad}

    def _hessian_product(self, change: Tensor) -> Tensor:
        """Differentiates the loss twice with respect to the output, along `change`."""
        if not self._slope.requires_grad:  # the loss is linear in the output
            return torch.zeros_like(change)
        (product,) = torch.autograd.grad(self._slope, self._output, change, retain_graph=True, allow_unused=True)
        return torch.zeros_like(change) if product is None else product.detach()


def _plain_attention() -> AbstractContextManager[object]:
    """Avoids the fused attention kernels, which have neither forward mode nor a double backward."""
    return sdpa_kernel(SDPBackend.MATH)


def _lacks_forward_mode(error: Exception) -> bool:
    """Recognises torch's messages for an operator, or an autograd.Function, without a forward derivative."""
    text = str(error).lower()
    return any(mark in text for mark in ("forward ad", "forward-ad", "forward mode", "forward-mode", "jvp"))
