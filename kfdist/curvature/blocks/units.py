"""Scales and shifts of single units: those of norms, and bare parameters that are multiplied or added (algorithms.md).

Their blocks are small enough to be the Fisher matrix itself, not a product of factors: "unit-wise", as Osawa et al.
(arXiv 1811.12019, 2002.06015) do it for batch normalisation.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from kfdist.curvature.blocks.base import Block, Operation, ParameterPart
from kfdist.types import BlockName, BlockShape

Role = Literal["scale", "shift", "either"]
"""What a part does to its units; a bare parameter does what the operation that uses it says."""


class UnitBlock(Block):
    """A block of c units y = scale x_hat + shift, each with a Fisher matrix of its own, `[k, k]` for its k numbers.

    For example i the gradient of a unit is (sum over positions of g x_hat, sum over positions of g). Uses of the same
    unit in one forward count as K-FAC counts them: their products add up.

    Attributes:
        roles: Of the parts: ("scale", "shift") for a norm, one of them where the other isn't trained, ("either",) for a
            bare parameter.

    Args:
        name: As for `Block`.
        module: As for `Block`.
        parts: One or two parts of equal size, one unit an entry.
        roles: As above.
        layer: As for `Block`.
    """

    operation = Operation("affine")

    def __init__(
        self,
        name: BlockName,
        module: nn.Module,
        parts: Sequence[ParameterPart],
        roles: Sequence[Role],
        layer: BlockName | None = None,
    ) -> None:
        super().__init__(name, module, parts[0], parts[1] if len(parts) > 1 else None, layer)
        self.roles = tuple(roles)
        self.shape = BlockShape(d_out=1, d_in=len(parts), groups=self.weight.numel())

    @property
    @override
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def bare_matrix(self) -> bool:
        """Whether it is a bare parameter of rows and columns: positions, a scale, or a matrix in disguise."""
        return self.roles == ("either",) and sum(size > 1 for size in self.parts[0].parameter.shape) > 1

    @property
    def named_weight(self) -> bool:
        """Whether its module calls it a weight, besides: hardly any scale is."""
        return self.bare_matrix and self.parts[0].attribute.startswith("weight")

    def fisher_sum(self, gradients: Float[Tensor, "n c k"]) -> Float[Tensor, "c k k"]:
        """Returns the sum over examples of v v^T of each unit, for gradients v."""
        if gradients.shape[-1] == 1:
            return gradients.square().sum(0).unsqueeze(-1)
        by_unit = gradients.transpose(0, 1)
        return by_unit.mT @ by_unit
