"""What methods on gradients alone have in common: which parameters they take, and what they keep of a gradient."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter
from kfdist.curvature.statistics import MODES, GradientMoments, Needs
from kfdist.linalg.modes import mode_moment
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class AbstractGradientInverter(AbstractInverter):
    """Inverts moments of the gradient that all ranks share after its reduction; nothing is captured for it.

    Its blocks are whole parameters (`TensorBlock`). Their moments are kept by the group's courier rank alone.

    Attributes:
        block_size: Longest dimension with a matrix of its own; longer ones are cut into pieces.
        vectors: Whether parameters of one dimension have a block too.
    """

    statistic: ClassVar[type] = GradientMoments

    block_size: int = 1024
    vectors: bool = False

    def __post_init__(self) -> None:
        checks.count("block_size", self.block_size, least=1)

    @override
    def needs(self, shape: BlockShape) -> Needs:
        return Needs(sums=frozenset(MODES[: len(shape.dimensions)]))

    def decay(self, ema_decay: float) -> float:
        """Returns rho of the moments' sums; 1 for plain sums."""
        return ema_decay

    def moments(
        self, tensor: Float[Tensor, "c ..."], inverse: AbstractPreconditioner | None, memory: BlockMemory
    ) -> dict[str, Float[Tensor, "c p p"]]:
        """Returns what one step's gradient adds to the sums, by name of the mode, without a host sync.

        Args:
            tensor: The gradient.
            inverse: What is in use; None before the first.
            memory: What the block keeps beside it, which stays.
        """
        del inverse, memory
        return {MODES[mode]: mode_moment(tensor, mode) for mode in range(tensor.dim() - 1)}
