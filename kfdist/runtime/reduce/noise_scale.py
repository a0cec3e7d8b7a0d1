"""The gradient noise scale: the batch size above which larger batches bring less and less.

B_simple = tr(Sigma) / |G|^2, for the expected gradient G and the covariance Sigma of one example's gradient (McCandlish
et al., arXiv 1812.06162, appendix A). Both are estimated without bias, from the gradients of all ranks' micro-batches
and from their mean. An average of ratios would be biased; here the averages are divided.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.capture.gradient_norms import MicroBatchNorms, few, joined, norm_of, sum_of_squares
from kfdist.comm.communicator import Communicator
from kfdist.comm.host_copy import HostCopy
from kfdist.comm.reduce import reduce_flat

_KEPT = 0.95
"""What a measurement keeps of those before it: averages are over about twenty. Over more, |G|^2 would be that of long
ago wherever gradients fall fast."""

_TOLERANCE = 0.02
"""How far `.grad` may be from a multiple of the sum of what the backwards added, which half precision rounds."""


class NoiseScale:
    """Measures the noise scale, on steps that the timetable names. All ranks make the same calls.

    Args:
        parameters: The model's.
        communicator: Carries some numbers per parameter on those steps.
        device: Where the averages live.

    Attributes:
        bytes_sent: What this rank contributed.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        communicator: Communicator,
        device: torch.device,
    ) -> None:
        self.bytes_sent = 0
        self._parameters = parameters
        self._communicator = communicator
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._sent = self._sums
        self._copy: HostCopy | None = None
        self._known = (0.0, 0.0, 0.0)
        self._alone = False

    def measure(self, found: MicroBatchNorms | None) -> None:
        """Folds one step into the averages; `.grad` is the mean of all ranks' gradients by now. Collective.

        A step counts for nothing where `.grad` is no multiple of what the backwards added, as far as their samples
        tell. The multiple is a GradScaler's scale and that of a clip by norm, which are divided out.

        Args:
            found: This rank's micro-batches; None where none were looked at.
        """
        ranks, device = self._communicator.world_size, self._sums.device
        if found is None or (ranks == 1 and found.count < 2):
            return  # one gradient says nothing of its noise
        gradients = [parameter.grad for parameter in self._parameters]
        if any(gradient is not None and gradient.is_sparse for gradient in gradients):
            gradients, found = [None] * len(gradients), MicroBatchNorms(count=0)
        sample = joined([None if each is None else few(each) for each in gradients], self._parameters, device)
        own = torch.zeros(4 + len(sample), dtype=torch.float64, device=device)
        if k := found.count:
            own[0], own[2], own[3] = 1.0, found.inverse_examples / k, found.inverse_examples / k**2
            own[1], own[4:] = found.squares * k, found.sample
        self.bytes_sent += own.numel() * own.element_size()
        (total,) = reduce_flat([own], self._communicator)
        expected, (ranks_with_it, small, q_small, q_large) = total[4:] / ranks, total[:4] / ranks
        factor = expected.dot(sample) / expected.square().sum()
        missed = (sample - factor * expected).square().sum()
        large = sum_of_squares([norm_of(each) for each in gradients if each is not None], device) / factor.square()
        signal, noise = unbiased(small, large, q_small, q_large / ranks)
        new = torch.stack([torch.ones_like(signal), signal, noise])
        new[1:] *= found.inverse_square_scale
        usable = (
            (ranks_with_it == 1)
            & (factor > 0)
            & (missed <= _TOLERANCE**2 * sample.square().sum())
            & torch.isfinite(new).all()
        )
        self._sums = torch.where(usable, _KEPT * self._sums + new, self._sums)
        self._bring()

    def heard_of(self, micro_batches: int) -> None:
        """Takes note of how many micro-batches a step had on this rank; 0 where nobody knows."""
        if micro_batches:
            self._alone = micro_batches == 1 and self._communicator.world_size == 1

    @property
    def can_tell(self) -> bool:
        """Whether norms of a next step would say anything, as far as it is known: one gradient says nothing."""
        return not self._alone

    def latest(self) -> float | None:
        """Returns B_simple in examples, as of a measurement that has reached the host.

        None before there is one, and while the noise hides the gradient: the estimate of |G|^2 isn't positive.
        """
        self._bring()
        weight, signal, noise = self._known
        return max(noise, 0.0) / signal if weight and signal > 0 else None

    def _bring(self) -> None:
        """Takes averages that have reached the host, and only then sends newer ones after them.

        A copy that gave way to a newer one before anybody took it would never be known to who asks after each step.
        """
        if self._copy is not None and self._copy.ready():
            self._known, self._copy = self._copy.wait()[0].tolist(), None
        if self._copy is None and self._sent is not self._sums:
            self._copy, self._sent = HostCopy([self._sums]), self._sums

    def state_dict(self) -> dict[str, Any]:
        """Returns the averages, equal on all ranks."""
        return {"gradient_noise": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned; states of earlier versions have none."""
        if (kept := state.get("gradient_noise")) is not None:
            self._sums = kept.to(self._sums)
            self._bring()


def unbiased(small: Tensor, large: Tensor, q_small: Tensor, q_large: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unbiased estimates of |G|^2 and tr(Sigma).

    For gradients g_i, means over b_i examples, that weigh w_i (sum_i w_i = 1) in the mean of all:
    E small = |G|^2 + q_small tr(Sigma), E large = |G|^2 + q_large tr(Sigma). With b examples each, and B in all, these
    are equations A.1 and A.2 of arXiv 1812.06162, where q_small = 1/b and q_large = 1/B.

    Args:
        small: sum_i w_i |g_i|^2.
        large: |sum_i w_i g_i|^2.
        q_small: sum_i w_i / b_i.
        q_large: sum_i w_i^2 / b_i.
    """
    noise = (small - large) / (q_small - q_large)
    return large - q_large * noise, noise
