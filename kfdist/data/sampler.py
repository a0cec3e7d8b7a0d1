"""Which examples a rank trains on at a step: a pure function of (seed, epoch, offset)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.errors import ConfigError
from kfdist.seeds import seed_from


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far the data has been consumed.

    Attributes:
        epoch: The current pass over the data, from 0.
        offset: How many examples of this pass all ranks together have consumed. Counted in examples and not in batches,
            so that a run resumed with another number of ranks neither repeats nor forgets any.
    """

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Deals the examples of each epoch's permutation to the ranks, full batches only.

    Attributes:
        examples: How many there are.
        batch_size: Examples per rank and step.
        world_size: How many ranks share a step.
        seed: Seeds the permutations.

    Raises:
        ConfigError: There are fewer examples than one step takes.
    """

    examples: int
    batch_size: int
    world_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.examples < self.step_examples:
            ranks = f"{self.world_size} ranks" if self.world_size > 1 else "1 rank"
            raise ConfigError(
                f"is {self.batch_size}; {ranks} would take {self.step_examples} examples a step but there are "
                f"{self.examples}; give at most {self.examples // self.world_size}",
                path="data.batch_size",
            )

    @property
    def step_examples(self) -> int:
        """How many examples all ranks together take in a step."""
        return self.batch_size * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch that was begun with this number of ranks."""
        return self.examples // self.step_examples

    def indices(self, position: Position, worker_rank: int) -> Tensor:
        """Returns what rank `worker_rank` trains on at `position`: int64 [batch_size].

        The position must be one that `start` or `advance` returned, so that a full batch is left in the epoch.
        """
        return self.permutation(position.epoch)[self.share(position, worker_rank)]

    def share(self, position: Position, worker_rank: int) -> slice:
        """Returns which part of the epoch's permutation `indices` are, for those who keep the permutation."""
        first = position.offset + worker_rank * self.batch_size
        return slice(first, first + self.batch_size)

    def permutation(self, epoch: int) -> Tensor:
        """Returns the order of all examples in an epoch: int64 [examples]."""
        generator = torch.Generator(device="cpu").manual_seed(seed_from(f"kfdist sampler {self.seed} {epoch}"))
        return torch.randperm(self.examples, generator=generator, device="cpu")

    def start(self, position: Position) -> Position:
        """Returns where to go on from a saved position: the next epoch if no full batch is left in this one."""
        if self.examples - position.offset < self.step_examples:
            return Position(epoch=position.epoch + 1)
        return position

    def advance(self, position: Position) -> Position:
        """Returns the position after the step at `position`."""
        return self.start(Position(epoch=position.epoch, offset=position.offset + self.step_examples))

    def steps_until(self, epochs: int, position: Position) -> int:
        """Returns how many steps are left from `position` until `epochs` epochs are done."""
        if position.epoch >= epochs:
            return 0
        in_this_epoch = (self.examples - position.offset) // self.step_examples
        return in_this_epoch + (epochs - position.epoch - 1) * self.steps_per_epoch

    def epoch_zero(self, step: int, position: Position) -> int:
        """Returns the step at which epoch 0 began, or would have begun had there always been this number of ranks.

        Counted back from the end of the current epoch: other numbers of ranks may have left no whole number of this
        one's steps behind in it. So it stays the same at all later steps, and a resumed run does as one that goes on.

        Args:
            step: Steps that are done.
            position: Where they led, as `start` or `advance` returned it.
        """
        ended = position.epoch + 1
        return step + self.steps_until(ended, position) - ended * self.steps_per_epoch
