"""Adam's moments of several small blocks side by side in memory, so that a pass over them is one operation."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from kfdist.curvature.adam_moments import (
    FIRST,
    FIRST_WEIGHT,
    SECOND,
    SECOND_WEIGHT,
    AbstractAdamBasis,
    next_weight,
)
from kfdist.curvature.block_memory import BlockMemory
from kfdist.torch_internals import foreach_add_, foreach_copy_, foreach_div_

_ALIGNED = 16
"""Numbers; a block begins at a multiple of so many, as a tensor of its own would."""


class MomentPack:
    """Does what `AbstractAdamBasis` does of one block at a step that learns, for several blocks of the host together.

    The moments stay what each block's memory keeps: the memory's tensors are views of the pack's. Whoever changes them
    in place changes the pack, and one that was replaced since, by another basis or a checkpoint, is taken in again.

    Args:
        members: The blocks' bases, all of one method and dtype.

    Attributes:
        gradients: One per block, `[c, p, q]`, for the caller to fill in before each `directions`, which overwrites it.
    """

    def __init__(self, members: Sequence[AbstractAdamBasis]) -> None:
        shapes = [member.shape for member in members]
        sizes = [math.prod(shape) for shape in shapes]
        room = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
        begins = [0, *accumulate(room)]
        like, count = members[0].trace_A, begins.pop()

        def views(flat: Tensor) -> list[Tensor]:
            parts = zip(begins, sizes, shapes, strict=True)
            return [flat[begin : begin + size].view(shape) for begin, size, shape in parts]

        self._R, self._first, self._second, self._roots = (like.new_zeros(count) for _ in range(4))
        self._weights = like.new_zeros(2, len(members))
        self.gradients = views(self._R)
        self._divisors = views(self._roots)
        weights = [row.unbind() for row in self._weights]
        kept = zip(views(self._first), views(self._second), *weights, strict=True)
        names = FIRST, SECOND, FIRST_WEIGHT, SECOND_WEIGHT
        self._kept = [dict(zip(names, of_block, strict=True)) for of_block in kept]

    def directions(
        self, members: Sequence[AbstractAdamBasis], memories: Sequence[BlockMemory]
    ) -> list[Float[Tensor, "c p q"]]:
        """Folds `gradients` into the moments and returns the directions, in tensors of their own, without autocast.

        Args:
            members: The bases in use now, with the shapes of those it was made with.
            memories: What each block keeps.
        """
        for memory, kept in zip(memories, self._kept, strict=True):
            _take_in(memory, kept)
        like = members[0]
        foreach_copy_(self.gradients, [m.coordinates(V) for m, V in zip(members, self.gradients, strict=True)])
        like.fold(self._R, self._first, self._second)
        scales = self._scales(like)
        torch.sqrt(self._second, out=self._roots)
        if len(set(scales)) == 1:
            self._R.div_(self._roots.add_(scales[0][0]))
        else:
            foreach_add_(self._divisors, [added for added, _ in scales])
            foreach_div_(self.gradients, self._divisors)
        triples = zip(members, self.gradients, scales, strict=True)
        return [member.matrix(U, scale) for member, U, (_, scale) in triples]

    def _scales(self, like: AbstractAdamBasis) -> list[tuple[float, float]]:
        """Brings the weights of the moments to this step; returns what `AbstractAdamBasis.scales` makes of them."""
        freshs, dtype = (1 - like.beta1, 1 - like.beta2), self._weights.dtype
        both = zip(self._weights.tolist(), freshs, strict=True)
        self._weights.copy_(torch.tensor([[next_weight(w, fresh) for w in row] for row, fresh in both], dtype=dtype))
        return [like.scales(*each, dtype) for each in zip(*self._weights.tolist(), strict=True)]


def _take_in(memory: BlockMemory, kept: dict[str, Tensor]) -> None:
    """Has the pack's tensors hold what a memory keeps, and the memory keep these."""
    for name, mine in kept.items():
        theirs = memory.kept.get(name)
        if theirs is mine:
            continue
        if theirs is None:
            mine.zero_()
        else:
            mine.copy_(theirs)
        memory.kept[name] = mine
