"""What a Brand update can't do without: its products at their shapes, and its small eigendecomposition, timed alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_REPETITIONS = 7


def brand_floor(d: int, rank: int, rows: int) -> dict[str, float]:
    """Times what an update of so many rows consists of, in CPU seconds of this thread, each the least of some.

    The products are P = U^T B, E = B - U P, U^T E, the lower half of E^T E in float32 and U X + E Y.

    Args:
        d: Size of the factor.
        rank: Eigenpairs before the update.
        rows: n.

    Returns:
        `products` and `eigendecomposition`.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    U, B, Z = draw(d, rank), draw(rows, d), draw(rank + rows, rank + rows)
    X, Y = Z.split([rank, rows], dim=-2)
    P = U.mT @ B.mT
    E = torch.baddbmm(B, P.mT, U.mT, alpha=-1).mT
    half = rows // 2
    products: tuple[Callable[[], Any], ...] = (
        lambda: U.mT @ B.mT,
        lambda: torch.baddbmm(B, P.mT, U.mT, alpha=-1),
        lambda: U.mT @ E,
        lambda: E[..., :half].mT @ E,  # as many operations as the lower half has
        lambda: (U @ X).baddbmm_(E, Y),
    )
    symmetric = Z @ Z.mT
    return {
        "products": sum(_least(each) for each in products),
        "eigendecomposition": _least(lambda: torch.linalg.eigh(symmetric)),
    }


def _least(action: Callable[[], Any]) -> float:
    found = []
    for _ in range(_REPETITIONS):
        begun = time.thread_time()
        action()
        found.append(time.thread_time() - begun)
    return min(found)


def over_floor(points: Sequence[Mapping[str, Any]], *names: str) -> dict[str, float]:
    """Returns by size how many times longer an update takes than some parts of its floor, which lie beside it."""
    return {str(each["d"]): round(each["seconds"] / sum(each["floor"][name] for name in names), 2) for each in points}
