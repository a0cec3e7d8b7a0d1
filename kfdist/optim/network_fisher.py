"""Products of the whole network's exact Fisher with directions, over all ranks' batches."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn

from kfdist.comm.reduce import reduce_flat
from kfdist.optim.output_fisher import (
    Differentiation,
    NoForwardDerivative,
    NotTogether,
    OutputFisher,
    OutputProduct,
)
from kfdist.optim.quadratic_model import InnerProducts, gram
from kfdist.optim.replay import Replay
from kfdist.runtime.preconditioner import Preconditioner

_LOG = logging.getLogger(__name__)


class NetworkFisher:
    """Forms the numbers that the quadratic model is made of. All ranks make the same calls.

    Args:
        preconditioner: Whose model it is; measures nothing meanwhile.
        parameters: Those that move.
        differentiation: "forward", "double_backward" or "auto".
    """

    def __init__(
        self, preconditioner: Preconditioner, parameters: Sequence[nn.Parameter], differentiation: str
    ) -> None:
        self._preconditioner = preconditioner
        self._parameters = parameters
        self._may_change = differentiation == "auto"
        self._how = Differentiation.FORWARD if self._may_change else Differentiation(differentiation)
        self._together = self._may_change

    def products(
        self, replay: Replay, rows: Tensor | None, directions: Sequence[Sequence[Tensor]]
    ) -> list[OutputProduct]:
        """Computes J u and H J u of all directions at the present parameters, for one linearisation.

        Args:
            replay: The step's closure.
            rows: Which examples of this rank's batch; all if None, and then one direction runs after the other: all
                together would take the memory of several training forwards.
            directions: The u, by parameter.
        """
        evaluate = replay.of(rows)
        u = [dict(zip(self._parameters, each, strict=True)) for each in directions]

        def run() -> tuple[Tensor, Tensor]:
            evaluation = evaluate()
            return evaluation.output, evaluation.loss

        @contextmanager
        def around() -> Iterator[None]:
            with self._preconditioner.paused(), replay.replaying():
                yield

        model = self._preconditioner.model
        if self._together and rows is not None:
            try:
                return OutputFisher(run, model, around=around, together=u).products_together()
            except NotTogether as error:
                self._together = False
                _LOG.info("AdaptiveStep: %s; directions are taken one after the other from now on", error)
        fisher = OutputFisher(run, model, around=around)
        return [self._product(fisher, each) for each in u]

    def _product(self, fisher: OutputFisher, u: Mapping[nn.Parameter, Tensor]) -> OutputProduct:
        """Computes J u and H J u, going over to the double backward for good where forward mode fails."""
        try:
            return fisher.along(u, self._how)
        except NoForwardDerivative as error:
            if not self._may_change:
                raise
            self._how = Differentiation.DOUBLE_BACKWARD
            _LOG.info("AdaptiveStep: %s; Jacobian products use the double backward from now on", error)
            return fisher.along(u, self._how)

    def inner_products(
        self, basis: Sequence[Sequence[Tensor]], products: Sequence[OutputProduct], share: float
    ) -> InnerProducts:
        """Forms all inner products of the basis, summed over ranks in one all-reduce.

        Those of parameters and gradients alone are averaged over the ranks, too, so that ranks decide alike even if
        these numbers differ in the last bit.
        """
        m, w = len(basis), 1.0 / self._preconditioner.world.world_size
        pairs = list(combinations_with_replacement(range(m), 2))
        inner = w * gram([[gradient_of(p) for p in self._parameters], *basis])
        parts = [inner[0, 1 + i] for i in range(m)]
        parts += [share * gram([[products[i].change], [products[j].curvature]])[0, 1] for i, j in pairs]
        parts += [inner[1 + i, 1 + j] for i, j in pairs]
        sums = iter(self.sum_over_ranks(torch.stack([each.to(parts[0].device) for each in parts])))
        slopes = torch.tensor([next(sums) for _ in range(m)], dtype=torch.float64, device="cpu")
        fisher = torch.zeros(m, m, dtype=torch.float64, device="cpu")
        lengths = torch.zeros_like(fisher)
        for matrix in (fisher, lengths):
            for i, j in pairs:
                matrix[i, j] = matrix[j, i] = next(sums)
        return InnerProducts(slopes=slopes, fisher=fisher, gram=lengths)

    def mean_curvature(self, replay: Replay, rows: Tensor | None, share: float, seed: int) -> float:
        """Estimates tr F over the number of parameters: the mean of u^T F u for a random u of independent entries.

        Source: Hutchinson (1990), with a single u.
        """
        draw = torch.Generator(device="cpu").manual_seed(seed)
        u = [torch.randn(p.shape, generator=draw, dtype=p.dtype, device="cpu").to(p.device) for p in self._parameters]
        (seen,) = self.products(replay, rows, [u])
        curvature = share * gram([[seen.change], [seen.curvature]])[0, 1]
        return self.sum_over_ranks(curvature.reshape(1))[0] / sum(p.numel() for p in self._parameters)

    def sum_over_ranks(self, values: Tensor) -> list[float]:
        """Sums numbers over all ranks."""
        return reduce_flat([values], self._preconditioner.world)[0].tolist()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Returns the gradient of a parameter that has one."""
    assert parameter.grad is not None  # AdaptiveStep gives every parameter one
    return parameter.grad.detach()
