"""Sums as they are at one moment, packed when somebody asks for them, or before they change: whichever is first.

What a rank hands to its inverters is half as large as its statistics. A thread of the link packs each group's when it
writes the job down, so that not all of it lies beside the sums, and the thread that trains needn't.
"""

import threading
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist.linalg.psd import pack_triangle, sum_of_products, triangle_size

SYMMETRIC = frozenset({"A", "G"})
"""Sums that are symmetric matrices and travel as packed triangles."""


class LateSums(Mapping[str, Tensor]):
    """One block's sums, symmetric ones as packed triangles, with its counts.

    Any thread may read it. A tensor that it returns is of that moment; nobody may write to it.

    Args:
        totals: The sums by name. Whoever changes them calls `freeze` first.
        counts: Its counts by name, which may change at any time.
        rows: Of those that are the products of few rows so far, these rows, `[c, r, d]`, which never change.

    Attributes:
        rows: As given: what travels in the place of a triangle.
    """

    def __init__(
        self,
        totals: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        rows: Mapping[str, Float[Tensor, "c r d"]] | None = None,
    ) -> None:
        self.rows = dict(rows or {})
        self._lock = threading.Lock()
        self._live = dict(totals)
        self._kept = {name: count.reshape(-1).clone() for name, count in counts.items()}
        self._shapes = {name: _packed_shape(name, total) for name, total in totals.items()}
        self._shapes |= {name: tuple(count.shape) for name, count in self._kept.items()}
        self._like = next(iter([*totals.values(), *counts.values()]), None)

    @override
    def __getitem__(self, name: str) -> Tensor:
        if name in self.rows:
            return self.own(name)
        with self._lock:
            return _packed(name, self._live[name]) if name in self._live else self._kept[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    @override
    def __len__(self) -> int:
        return len(self._shapes)

    @override
    def __contains__(self, name: object) -> bool:  # a `Mapping` would pack for it
        return name in self._shapes

    def own(self, name: str) -> Float[Tensor, "..."]:
        """Returns a tensor as `[]` does, which is the caller's to change."""
        if name in self.rows:  # whether or not the sum has changed since, so that no bit depends on it
            return pack_triangle(sum_of_products(self.rows[name]))
        with self._lock:
            return _packed(name, self._live[name]) if name in self._live else self._kept[name].clone()

    def put(self, name: str, place: Float[Tensor, "..."]) -> None:
        """Writes a tensor to where it is wanted, contiguous memory of its size."""
        if name in self.rows:
            place.copy_(self.own(name).reshape(-1))
            return
        with self._lock:
            live = self._live.get(name)
            if live is not None and name in SYMMETRIC:
                pack_triangle(live, out=place.view(self._shapes[name]))
                return
        place.copy_((self[name] if live is None else live).reshape(-1))

    def freeze(self) -> None:
        """Packs what nobody has asked for: the sums are about to change."""
        with self._lock:
            self._kept |= {name: _packed(name, each) for name, each in self._live.items() if name not in self.rows}
            self._live = {}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of the tensors, by name in order."""
        return self._shapes

    @property
    def on_host(self) -> bool:
        """Whether the tensors are in the host's memory, which any thread may read at any time."""
        return self._like is None or self._like.device == torch.device("cpu")


def _packed(name: str, total: Tensor) -> Tensor:
    return pack_triangle(total) if name in SYMMETRIC else total.clone()


def _packed_shape(name: str, total: Tensor) -> tuple[int, ...]:
    shape = tuple(total.shape)
    return (*shape[:-2], triangle_size(shape[-1])) if name in SYMMETRIC else shape
