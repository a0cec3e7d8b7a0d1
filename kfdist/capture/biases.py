"""Which blocks leave out the bias that they were planned with, since no product of their weight adds it."""

from collections.abc import Iterable, Mapping, Sequence

from kfdist.capture.seen_uses import SeenUses
from kfdist.curvature.blocks import Block, LayerBlock

UNKNOWN, APART, ADDED = -1, 0, 1
"""Of a block's bias: its weight wasn't used yet; it was, and never with the bias; some product added the bias."""


class Biases:
    """The biases that blocks were planned with.

    Which of them stay is for all ranks to decide alike: one that never runs a layer has its gradient from the others.

    Args:
        blocks: All blocks.
        uses: Their uses on this rank.
    """

    def __init__(self, blocks: Iterable[Block], uses: SeenUses) -> None:
        self._blocks = [block for block in blocks if block.has_bias and isinstance(block, LayerBlock)]
        self._uses = uses
        self.agreed: Sequence[int] = [UNKNOWN] * len(self._blocks)

    @property
    def seen(self) -> list[int]:
        """What this rank knows of each, in the model's order; the ranks' largest numbers are what they all know."""
        mine = (self._uses.biased.get(block.name, UNKNOWN) for block in self._blocks)
        return [max(before, int(use)) for before, use in zip(self.agreed, mine, strict=True)]

    def settle(self, agreed: Sequence[int]) -> None:
        """Keeps each bias, or leaves it out, as all ranks together know of it; until they do, it keeps its gradient."""
        self.agreed = list(agreed)
        for block, use in zip(self._blocks, self.agreed, strict=True):
            block.keep_bias(use == ADDED)

    @property
    def left_out(self) -> Mapping[str, str]:
        """Why the bias is left out, by block."""
        found = {}
        for block, use in zip(self._blocks, self.agreed, strict=True):
            if use == APART:
                uses = ", ".join(sorted(self._uses.unhandled[block.name, True])) or "nothing that was seen"
                found[block.name] = (
                    f"no product of its layer's weight adds it (it is used by {uses}): the block leaves it out"
                )
        return found
