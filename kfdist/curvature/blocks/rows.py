"""Rows of a layer's inputs and output gradients: drawing, laying out and adding them up, in tiles of bounded size.

Windows are a tensor `[c, n, *positions, *features]`, most often a view that costs nothing: what the weight meets at
each position of each example, before it is laid out as rows `[c, n T, d]`.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from kfdist.linalg.arithmetic import fast_products

TILE_BYTES = 32 << 20
"""Rows held at once, in bytes. The patches of a whole batch of images can be a hundred times the images; a tile of this
size is large enough that the matrix product dominates its overhead, and small beside the activations of any model that
needs tiling."""


def accumulation_dtype(tensor: Float[Tensor, "..."]) -> torch.dtype:
    """Returns the dtype for products of `tensor`: float64 stays, everything else becomes float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def draw_positions(
    positions: int, fraction: float, seed: int, most: int | None = None
) -> Int64[Tensor, " used"] | None:
    """Draws some of the positions 0..T-1 uniformly without replacement.

    Args:
        positions: Number of positions T.
        fraction: Share in (0, 1]; at least one position is drawn.
        seed: Seeds the draw, which is made on the CPU.
        most: Upper limit of the draw, at least 1; None: no limit.

    Returns:
        Sorted positions on the CPU, or None for all of them.

    Raises:
        ValueError: `fraction` is outside (0, 1], or `most` is below 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"positions_fraction is {fraction}, must be in (0, 1]")
    if most is not None and most < 1:
        raise ValueError(f"most_positions is {most}, must be at least 1, or None for no limit")
    count = max(1, round(fraction * positions))
    if most is not None:
        count = min(count, most)
    if count >= positions:
        return None
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randperm(positions, generator=generator, device="cpu")[:count].sort().values


def tiles(
    examples: int,
    positions: int,
    chosen: Int64[Tensor, " used"] | None,
    *,
    row_bytes: int,
    example_bytes: int,
    device: torch.device,
) -> Iterator[tuple[slice, list[Int64[Tensor, " _"] | None]]]:
    """Splits examples and positions so that no tile of rows is larger than `TILE_BYTES`.

    Args:
        examples: N.
        positions: T.
        chosen: Positions to use, on `device`; None for all.
        row_bytes: Bytes of one position's rows of one example, all groups together.
        example_bytes: Bytes held for an example besides its rows.
        device: Where indices of positions are made.

    Yields:
        Examples, and for each tile of their rows its positions, as `chosen` or None for all. Several examples come with
        all their positions; where even one example's rows are too large, it comes alone with its positions in pieces
        (the `example_bytes` of one example and the rows of one position are held whatever their size).
    """
    used = positions if chosen is None else len(chosen)
    whole = TILE_BYTES // max(1, used * row_bytes + example_bytes)
    if whole >= 1 or used <= 1:
        step = max(1, whole)
        for start in range(0, examples, step):
            yield slice(start, start + step), [chosen]
        return
    piece = max(1, TILE_BYTES // max(1, row_bytes))
    pieces: list[Tensor | None] = [chosen]
    if piece < used:
        every = torch.arange(positions, device=device) if chosen is None else chosen
        pieces = list(every.split(piece))
    for start in range(examples):
        yield slice(start, start + 1), pieces


def lay_out(windows: Float[Tensor, "c ..."], features: int, dtype: torch.dtype) -> Float[Tensor, "c rows d"]:
    """Lays windows out as rows, n T of them, example by example, with one copy at most.

    The last `features` dimensions of the windows are features.
    """
    width = math.prod(windows.shape[windows.dim() - features :])
    rows = math.prod(windows.shape[1 : windows.dim() - features])
    return windows.to(dtype, memory_format=torch.contiguous_format).reshape(len(windows), rows, width)


class RowSums:
    """Adds up the rows r of one side of a layer: sum of r r^T, and sum of r, whichever is wanted.

    Args:
        like: Of the rows' dtype and device.
        shape: Groups c and width d of the rows.
        second: Whether to add up r r^T.
        first: Whether to add up r.
        border: Leave room in the sum of r r^T for the homogeneous coordinate: see `bordered`.

    Attributes:
        second: Sum of r r^T, `[c, d, d]`, or None.
        first: Sum of r, `[c, d]`, or None.
    """

    def __init__(
        self, like: Float[Tensor, "..."], shape: tuple[int, int], *, second: bool, first: bool, border: bool = False
    ) -> None:
        c, d = shape
        dtype = accumulation_dtype(like)
        self._like, self._groups = like, c
        self._whole = like.new_zeros(c, d + border, d + border, dtype=dtype) if second else None
        self.second = None if self._whole is None else self._whole[:, :d, :d]
        self.first = like.new_zeros(c, d, dtype=dtype) if first else None

    @property
    def wanted(self) -> bool:
        """Whether anything is to be added up."""
        return self.second is not None or self.first is not None

    def lays_out(self, chosen: Int64[Tensor, " used"] | None) -> bool:
        """Whether `add` or its caller copies windows of these positions; sums of rows are taken from views."""
        return self.second is not None or (self.first is not None and chosen is not None)

    def none(self, dims: int) -> Float[Tensor, "c ..."]:
        """Returns what stands for a sum that wasn't asked for: `[c, 0]`, or `[c, 0, 0]` for two dims."""
        return self._like.new_zeros(self._groups, *(0,) * dims, dtype=accumulation_dtype(self._like))

    def add(self, windows: Float[Tensor, "c n ..."], features: int) -> None:
        """Adds windows `[c, n, *positions, *features]`; laid out as rows only where products of them are wanted."""
        if self.second is not None:
            rows = lay_out(windows, features, self.second.dtype)
            with fast_products(rows.device):
                self.second.baddbmm_(rows.mT, rows)  # in place: autocast leaves such products alone
            if self.first is not None:
                self.first += rows.sum(1)
        elif self.first is not None and windows.numel():
            over = tuple(range(1, windows.dim() - features))
            self.first += windows.sum(over, dtype=self.first.dtype).reshape(self.first.shape)

    def scale(self, factor: float) -> None:
        """Multiplies the sums."""
        for estimate in (self.second, self.first):
            if estimate is not None:
                estimate.mul_(factor)

    def bordered(self, rows: int | Float[Tensor, ""], *, ones: bool) -> Float[Tensor, "c d_1 d_1"] | None:
        """Returns the sum of r r^T as if each of `rows` rows r ended in a 1, or in a 0, `[c, d + 1, d + 1]`.

        The border lies around the sum: a wide layer's is copied nowhere. None if the sum isn't wanted.
        """
        if self._whole is not None and self.first is not None and ones:
            d = self._whole.shape[-1] - 1
            self._whole[:, :d, d] = self.first
            self._whole[:, d, :d] = self.first
            self._whole[:, d, d] = rows
        return self._whole
