"""Sparse gradients of tables against dense ones."""

import pytest
import torch
from torch import Tensor

from kfdist.linalg import sparse_rows
from kfdist.linalg.sparse_rows import dense_of, overwrite, sparse_of

V, P = 7, 3


def gradient(numbers: list[int], *, coalesced: bool = False) -> Tensor:
    values = torch.randn(len(numbers), P, generator=torch.Generator().manual_seed(0))
    made = torch.sparse_coo_tensor(torch.tensor([numbers], dtype=torch.int64), values, (V, P), check_invariants=True)
    return made.coalesce() if coalesced else made


@pytest.mark.parametrize("coalesced", [False, True])
@pytest.mark.parametrize("numbers", [[], [3], [5, 0, 5, 5, 6, 0]], ids=str)
def test_dense_and_overwritten(numbers: list[int], coalesced: bool):
    sparse = gradient(numbers, coalesced=coalesced)
    before = sparse.coalesce().indices()
    torch.testing.assert_close(dense_of(sparse), sparse.to_dense())
    rows = torch.randn(V, P)
    overwrite(sparse, rows)
    expected = torch.zeros(V, P)
    expected[numbers] = rows[numbers]
    assert torch.equal(sparse.to_dense(), expected)
    assert torch.equal(sparse.coalesce().indices(), before)


def test_a_dense_gradient_is_itself():
    rows = torch.randn(V, P)
    assert dense_of(rows) is rows


@pytest.mark.parametrize("device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("numbers", [[], [3], [5, 0, 6], list(range(V))], ids=str)
def test_sparse_of_the_rows_that_are_not_zero(monkeypatch: pytest.MonkeyPatch, numbers: list[int], device: bool):
    monkeypatch.setattr(sparse_rows, "_on_host", lambda tensor: not device)
    rows = torch.zeros(V, P)
    rows[numbers] = torch.randn(len(numbers), P)
    sparse = sparse_of(rows)
    assert sparse.is_sparse and torch.equal(sparse.to_dense(), rows)
    listed = sparse.coalesce().indices()[0].tolist()
    assert listed == (sorted(numbers) or [0] * device)
