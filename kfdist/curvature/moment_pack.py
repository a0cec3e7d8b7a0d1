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
from kfdist.torch_internals import foreach_add_, foreach_div_

_ALIGNED = 16
"""Numbers; a block begins at a multiple of so many, as a tensor of its own would."""


class MomentPack:
    """Does what `AbstractAdamBasis` does of one block at a step that learns, for several blocks of the host together.

    The moments stay what each block's memory keeps: the memory's tensors are views of the pack's. Whoever changes them
    in place changes the pack, and one that was replaced since, by another basis or a checkpoint, is taken in again.

    Args:
        members: The blocks' bases, all of one method with the same settings, and of one dtype.

    Attributes:
        gradients: One per block, `[c, p, q]`, for the caller to fill in before each `turn_to_directions`.
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
        self._weights = [like.new_zeros(len(members)) for _ in range(2)]
        self.gradients = views(self._R)
        self._divisors = views(self._roots)
        weights = [row.unbind() for row in self._weights]
        kept = zip(views(self._first), views(self._second), *weights, strict=True)
        names = FIRST, SECOND, FIRST_WEIGHT, SECOND_WEIGHT
        self._kept: list[dict[str, Tensor]] = [dict(zip(names, of_block, strict=True)) for of_block in kept]

    def turn_to_directions(self, members: Sequence[AbstractAdamBasis], memories: Sequence[BlockMemory]) -> None:
        """Folds `gradients` into the moments and overwrites them with the directions, without autocast.

        Args:
            members: The bases in use now, with the shapes, settings and dtype of those it was made with.
            memories: What each block keeps.
        """
        for memory, kept in zip(memories, self._kept, strict=True):
            _take_in(memory, kept)
        like = members[0]
        for member, V in zip(members, self.gradients, strict=True):
            member.turn(V)
        like.fold(self._R, self._first, self._second)
        scales = self._scales(like)
        torch.sqrt(self._second, out=self._roots)
        if len(scales) == 1:
            self._R.div_(self._roots.add_(scales[0][0]))
            scales *= len(members)
        else:
            foreach_add_(self._divisors, [added for added, _ in scales])
            foreach_div_(self.gradients, self._divisors)
        for member, U, (_, scale) in zip(members, self.gradients, scales, strict=True):
            member.turn_back(U, scale)

    def _scales(self, like: AbstractAdamBasis) -> list[tuple[float, float]]:
        """Brings the weights of the moments to this step; returns what `AbstractAdamBasis.scales` makes of them.

        Returns:
            One entry per block; a single one where all are alike, as they are but after a step that some sat out.
        """
        known = zip(self._weights, (1 - like.beta1, 1 - like.beta2), strict=True)
        both = [[next_weight(w, fresh) for w in _distinct(row)] for row, fresh in known]
        for row, weights in zip(self._weights, both, strict=True):
            if len(weights) == 1:
                row.fill_(weights[0])
            else:
                row.copy_(torch.tensor(weights, dtype=row.dtype, device="cpu"))
        first, second = (_distinct(row) for row in self._weights)  # rounded, as they are kept
        count = max(len(first), len(second))
        first, second = (each * count if len(each) == 1 else each for each in (first, second))
        dtype = self._R.dtype
        return [like.scales(w1, w2, dtype) for w1, w2 in zip(first, second, strict=True)]


def _distinct(row: Float[Tensor, " blocks"]) -> list[float]:
    """Returns the numbers of a row; a single one where all are alike."""
    numbers = row.tolist()
    return numbers[:1] if numbers.count(numbers[0]) == len(numbers) else numbers


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
