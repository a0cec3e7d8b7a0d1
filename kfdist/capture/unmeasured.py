"""Which blocks were due and have a gradient, but not all of it in their statistics, and why."""

from collections.abc import Iterable, Mapping, Set

from kfdist.capture.watch import Watch
from kfdist.curvature.blocks import Block


class Unmeasured:
    """What is known of blocks that aren't measured as a whole.

    Args:
        blocks: All blocks, by name.
        watch: Knows what uses them.

    Attributes:
        unseen: The blocks of which there are no statistics at all.
        in_eval_mode: Blocks that were used in eval mode since `note`.
    """

    def __init__(self, blocks: Mapping[str, Block], watch: Watch) -> None:
        self._blocks = blocks
        self._watch = watch
        self._reasons: dict[str, str] = {}
        self.unseen: set[str] = set()
        self.in_eval_mode: set[str] = set()

    def note(self, due: Iterable[str], measured: Set[str]) -> None:
        """Notes what became of the blocks that were due.

        A use that can't be measured is remembered: it was seen when every module was watched.
        """
        for name in due:
            self._reasons.pop(name, None)
            self.unseen.discard(name)
            block, unhandled = self._blocks[name], self._watch.unhandled[name, False]
            if block.has_bias:
                unhandled = unhandled | self._watch.unhandled[name, True]
            others = ", ".join(sorted(unhandled))
            if name not in measured:
                self._watch.look_again(name)
            elif not others:
                continue
            if any(parameter.grad is not None for parameter in block.parameters()):
                self.unseen |= {name} - measured
                also = "also " if name in measured else ""
                unseen = "no use of it was seen"
                if name in self.in_eval_mode:
                    unseen = "it was used in eval mode alone; call model.train() before the forward"
                self._reasons[name] = f"it is {also}used by {others}, which can't be measured" if others else unseen
        self.in_eval_mode.clear()

    @property
    def reasons(self) -> Mapping[str, str]:
        """By block, or its bias, why it isn't measured, or not as a whole, as of when it was last due."""
        return {**self._reasons, **{f"{name}, its bias": reason for name, reason in self.left_out.items()}}

    @property
    def left_out(self) -> Mapping[str, str]:
        """The blocks whose bias is left out, since it isn't added to a product of their weight, and why."""
        found = {}
        for name, biased in self._watch.biased.items():
            if not biased:
                uses = ", ".join(sorted(self._watch.unhandled[name, True])) or "nothing that was seen"
                found[name] = (
                    f"no product of its layer's weight adds it (it is used by {uses}): the block leaves it out"
                )
        return found
