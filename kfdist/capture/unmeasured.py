"""Which blocks were due and have a gradient, but not all of it in their statistics, and why."""

from collections.abc import Iterable, Mapping, Set

from kfdist.capture.biases import Biases
from kfdist.capture.seen_uses import SeenUses
from kfdist.curvature.blocks import Block

UNSEEN = "no use of it was seen"
EMPTY = "its batch had no examples"


class Unmeasured:
    """What is known of blocks that aren't measured as a whole.

    Args:
        blocks: All blocks, by name.
        uses: Of their parameters.
        biases: Knows which of theirs are left out.

    Attributes:
        unseen: The blocks of which there are no statistics at all.
        in_eval_mode: Blocks that were used in eval mode since `note`.
    """

    def __init__(self, blocks: Mapping[str, Block], uses: SeenUses, biases: Biases) -> None:
        self._blocks = blocks
        self._uses = uses
        self._biases = biases
        self._reasons: dict[str, str] = {}
        self.unseen: set[str] = set()
        self.in_eval_mode: set[str] = set()

    def note(self, due: Iterable[str], measured: Set[str], empty: Set[str]) -> None:
        """Notes what became of the blocks that were due.

        A use that can't be measured is remembered: it was seen when every module was watched.

        Args:
            due: These blocks.
            measured: Those that have statistics.
            empty: Those that a batch without examples went through.
        """
        for name in due:
            self._reasons.pop(name, None)
            self.unseen.discard(name)
            block, unhandled = self._blocks[name], self._uses.unhandled[name, False]
            if block.frozen and name not in measured:  # a bias that is trained all the same has a gradient
                continue
            if block.has_bias:
                unhandled = unhandled | self._uses.unhandled[name, True]
            others = ", ".join(sorted(unhandled))
            if name not in measured:
                self._uses.look_again(name)
            elif not others:
                continue
            if any(parameter.grad is not None for parameter in block.parameters()):
                self.unseen |= {name} - measured
                also = "also " if name in measured else ""
                unseen = "no product with it was seen, of which the code has one" if block.looked_up else UNSEEN
                if name in empty:
                    unseen = EMPTY
                elif name in self.in_eval_mode:
                    unseen = "it was used in eval mode alone; call model.train() before the forward"
                self._reasons[name] = f"it is {also}used by {others}, which can't be measured" if others else unseen
        self.in_eval_mode.clear()

    @property
    def reasons(self) -> Mapping[str, str]:
        """By block, or its bias, why it isn't measured, or not as a whole, as of when it was last due."""
        left_out = {f"{name}, its bias": reason for name, reason in self._biases.left_out.items()}
        return {**self._reasons, **left_out}
