"""How much memory a method takes for a block: what is there all the time, and what comes and goes."""

import math
from typing import NamedTuple

from kfdist.curvature.averages import sum_shapes
from kfdist.curvature.inverter import AbstractInverter
from kfdist.types import BlockShape

NUMBER_BYTES = 4


class Footprint(NamedTuple):
    """Bytes of one block on one rank, in float32.

    Attributes:
        kept: Averages, the inverse in use with the state of the next one, what is worked out of the inverse for its
            damping, and of online methods the bytes of the last result, which the next job goes on from.
        folding: The batch's own sums, beside the averages that they are added to.
        inversion: The job, its dense factors, and the result twice (`kfdist.curvature.jobs.run_job`).
        encoded: The result's bytes, which `state_dict` makes of the inverse in use, in the host's memory. Those of all
            blocks are there until the checkpoint is written; meanwhile inversions go on.
    """

    kept: int
    folding: int
    inversion: int
    encoded: int

    @property
    def passing(self) -> int:
        """What comes and goes at the worst moment, where the rank inverts for itself, in the memory of the averages."""
        return max(self.folding, self.inversion + self.encoded)

    @property
    def most(self) -> int:
        """What there is at the worst moment, where the rank inverts for itself."""
        return self.kept + self.passing


def footprint(inverter: AbstractInverter, shape: BlockShape) -> Footprint:
    """Estimates what a block of this shape takes, alone in its group."""
    needs = inverter.needs(shape)
    sums = sum(math.prod(size) for size in sum_shapes(shape, needs).values())
    rows = (
        shape.groups
        * needs.increment_rows
        * sum({"A": shape.d_in, "G": shape.d_out}[name] for name in needs.increments)
    )
    estimate = inverter.estimate(shape)
    copies = 2 if inverter.online else 1
    result, prepared = shape.groups * estimate.numbers, shape.groups * estimate.prepared
    return Footprint(
        kept=NUMBER_BYTES * (sums + copies * result + prepared),
        folding=NUMBER_BYTES * (sums + rows),
        inversion=NUMBER_BYTES * (sums // 2 + rows + sums + result + max(result, shape.groups * estimate.workspace)),
        encoded=NUMBER_BYTES * result,
    )
