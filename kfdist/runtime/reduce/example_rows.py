"""Brings the rows of single examples from all ranks to whoever inverts with them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist.comm.communicator import Communicator
from kfdist.curvature.averages import ExampleRows, all_finite
from kfdist.curvature.statistics import SampleBudget, Samples
from kfdist.linalg.lowrank import compress_columns
from kfdist.linalg.uploads import sent
from kfdist.types import BlockName, BlockShape


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What one rank brings of one block.

    Attributes:
        block: The block's name.
        shape: Its shape.
        budget: How many examples are wanted of all ranks together.
        rows: This rank's; None if it had no batch.
        step_is_finite: Boolean scalar; where false the rows count for nothing. None: true.
        destination: The rank that needs them; None: all ranks do.
        seed: Of this rank's draws.
        dtype: Of the rows.
    """

    block: BlockName
    shape: BlockShape
    budget: SampleBudget
    rows: ExampleRows | None
    step_is_finite: Tensor | None
    destination: int | None
    seed: int
    dtype: torch.dtype


class SampleExchange:
    """Gathers samples in frames of one size for all ranks.

    A frame has room for a fixed number of examples and positions. The examples follow from the budget; the positions
    are the most that any rank had when the block was first due, agreed then. A shorter batch is filled up with zeros, a
    longer one has its positions sub-sampled, scaled so that sums over them keep their expectation. How many positions
    an example had travels with it.

    Args:
        communicator: Carries the rows.
        device: Where the rows live.

    Attributes:
        frames: Positions by block; a checkpoint keeps them, whatever the first batch of a resumed run is.
        bytes_sent: What this rank contributed so far.
    """

    def __init__(self, communicator: Communicator, device: torch.device) -> None:
        self._communicator = communicator
        self._device = device
        self.frames: dict[BlockName, int] = {}
        self.bytes_sent = 0

    def gather(self, requests: Sequence[SampleRequest]) -> dict[BlockName, Samples]:
        """Returns the samples of all ranks that this rank needs; all ranks must bring the same requests.

        A block whose rows no rank ever had has none either.
        """
        self._agree_on_frames(requests)
        framed = [request for request in requests if self.frames[request.block]]
        gathered: dict[BlockName, Samples] = {}
        destinations = {request.destination for request in framed}
        for destination in sorted(destinations, key=lambda rank: -1 if rank is None else rank):
            alike = [request for request in framed if request.destination == destination]
            gathered |= self._gather_alike(alike, destination)
        return gathered

    def _agree_on_frames(self, requests: Sequence[SampleRequest]) -> None:
        new = [request for request in requests if not self.frames.get(request.block)]
        if not new:
            return
        own = [0 if request.rows is None else request.rows.frame for request in new]
        everyone = self._communicator.all_gather_json(own)
        for request, positions in zip(new, zip(*everyone, strict=True), strict=True):
            self.frames[request.block] = max(positions)

    def _gather_alike(self, requests: Sequence[SampleRequest], destination: int | None) -> dict[BlockName, Samples]:
        """Gathers what goes to one destination in one flat buffer."""
        pieces = [piece for request in requests for piece in self._framed(request)]
        flat = self._communicator.to_travel(torch.cat([piece.reshape(-1) for piece in pieces]))
        self.bytes_sent += flat.numel() * flat.element_size()
        if destination is None:
            parts = self._communicator.all_gather(flat)
        else:
            parts = self._communicator.gather(flat, destination)
        if not parts:
            return {}
        sizes = [piece.numel() for piece in pieces]
        of_ranks = [
            [part.view(piece.shape) for part, piece in zip(each.to(self._device).split(sizes), pieces, strict=True)]
            for each in parts
        ]
        gathered = {}
        for index, request in enumerate(requests):
            a, g, weight, terms, positions = (
                torch.cat([rank[5 * index + field] for rank in of_ranks], dim=1 if field < 2 else 0)
                for field in range(5)
            )
            per_rank = len(weight) // len(of_ranks)
            source = torch.arange(len(of_ranks), device=self._device).repeat_interleave(per_rank)
            gathered[request.block] = Samples(a=a, g=g, weight=weight, terms=terms, source=source, positions=positions)
        return gathered

    def _framed(self, request: SampleRequest) -> tuple[Tensor, ...]:
        """Returns the fields of `ExampleRows` in the frame's size: `[c, n, T, q]`, `[c, n, T, p]` and three `[n]`."""
        positions = self.frames[request.block]
        examples = examples_per_rank(request.budget, positions, self._communicator.world_size)
        kept = min(positions, request.budget.columns or positions)
        a = _zeros(request, examples, kept, request.shape.d_in, self._device)
        g = _zeros(request, examples, kept, request.shape.d_out, self._device)
        weight, own_terms, own_positions = a.new_zeros(3, examples)
        if request.rows is None or not len(request.rows.weight):
            return a, g, weight, own_terms, own_positions
        most = positions if request.budget.columns is None else request.rows.a.shape[2]  # compressed below instead
        rows = _fewer(request.rows, examples, most, request.seed)
        own_a, own_g, own_weight = _clean(rows, request.step_is_finite)
        if own_a.shape[2] > kept:
            own_a, own_g = compress_columns(own_a, own_g, kept)
        n, t = own_a.shape[1], own_a.shape[2]
        a[:, :n, :t], g[:, :n, :t], weight[:n] = own_a, own_g, own_weight
        own_terms[:n], own_positions[:n] = rows.terms, rows.positions
        return a, g, weight, own_terms, own_positions


def local_samples(request: SampleRequest, communicator: Communicator, device: torch.device) -> Samples:
    """Returns this rank's own rows with all their positions, of no more examples than its share of the budget."""
    rows = request.rows
    if rows is None:
        a, g = (_zeros(request, 0, 1, d, device) for d in (request.shape.d_in, request.shape.d_out))
        none = a.new_zeros(0)
        rows = ExampleRows(a=a, g=g, weight=none, terms=none, positions=none, frame=1)
    else:
        positions = rows.a.shape[2]
        share = examples_per_rank(request.budget, positions, communicator.world_size)
        rows = _fewer(rows, share, positions, request.seed)
    a, g, weight = _clean(rows, request.step_is_finite)
    source = torch.full((len(weight),), communicator.rank, dtype=torch.int64, device=device)
    return Samples(a=a, g=g, weight=weight, terms=rows.terms, source=source, positions=rows.positions)


def examples_per_rank(budget: SampleBudget, positions: int, world_size: int) -> int:
    """Returns a rank's share of a budget: at least one example, at most its share of the rows."""
    examples = -(-budget.examples // world_size)
    if budget.rows is not None:
        rows = min(positions, budget.columns or positions)
        examples = min(examples, max(1, -(-budget.rows // world_size) // rows))
    return examples


def _fewer(rows: ExampleRows, examples: int, positions: int, seed: int) -> ExampleRows:
    """Draws examples and positions where there are more than fit; expectations of sums stay what they are."""
    a, g, weight, terms, own = rows.a, rows.g, rows.weight, rows.terms, rows.positions
    generator = torch.Generator(device="cpu").manual_seed(seed)
    if a.shape[1] > examples:
        chosen = torch.randperm(a.shape[1], generator=generator, device="cpu")[:examples]
        chosen = sent(chosen, a.device)
        a, g, weight = a[:, chosen], g[:, chosen], weight[chosen] * (rows.a.shape[1] / examples)
        terms, own = terms[chosen], own[chosen]
    if a.shape[2] > positions:
        chosen = torch.randperm(a.shape[2], generator=generator, device="cpu")[:positions].sort().values
        chosen = sent(chosen, a.device)
        # Half of the scale each: sums of g a^T, a a^T and g g^T all keep their expectation.
        root = (rows.a.shape[2] / positions) ** 0.5
        a, g = a[:, :, chosen] * root, g[:, :, chosen] * root
    return ExampleRows(a=a, g=g, weight=weight, terms=terms, positions=own, frame=rows.frame)


def _zeros(request: SampleRequest, examples: int, positions: int, width: int, device: torch.device) -> Tensor:
    return torch.zeros((request.shape.groups, examples, positions, width), dtype=request.dtype, device=device)


def _clean(rows: ExampleRows, step_is_finite: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the rows, all zero where any is non-finite or the step is skipped, without a host sync."""
    usable = all_finite((rows.a, rows.g))
    if step_is_finite is not None:
        usable = usable & step_is_finite
    zero = torch.zeros((), dtype=rows.a.dtype, device=rows.a.device)
    return (
        torch.where(usable, rows.a, zero),
        torch.where(usable, rows.g, zero),
        torch.where(usable, rows.weight.to(rows.a.dtype), zero),
    )
