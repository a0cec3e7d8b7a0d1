"""Sparse gradients of tables, whose entries are whole rows, read and written without a wait for their device.

How many different rows such a gradient has is known to the device alone, so `coalesce` and `to_sparse` make the host
wait.
"""

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from kfdist.torch_internals import entries_of


def dense_of(gradient: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
    """Returns a gradient, sparse or dense, as a dense one; entries of the same row add up."""
    if not gradient.is_sparse:
        return gradient
    rows, values = entries_of(gradient)
    return values.new_zeros(gradient.shape).index_add_(0, rows, values)


def overwrite(gradient: Float[Tensor, "V p"], rows: Float[Tensor, "V p"]) -> None:
    """Sets the rows that a sparse gradient has to those of a dense matrix; it keeps its entries.

    The first entry of each row gets it whole and the others 0, so that their sum is it to the bit, in any order.
    """
    places, values = entries_of(gradient)
    numbers = torch.arange(len(places), device=places.device)
    first = numbers.new_zeros(len(gradient)).scatter_reduce_(0, places, numbers, "amin", include_self=False)
    is_first = first.index_select(0, places) == numbers
    values.copy_(rows.index_select(0, places).masked_fill_(~is_first.unsqueeze(-1), 0))


def sparse_of(rows: Float[Tensor, "V p"]) -> Float[Tensor, "V p"]:
    """Returns a dense matrix as a sparse gradient of the rows that aren't zero.

    On a device it has V entries, as many as rows could be; the ones too many are zeros, of a row that it has.
    """
    if _on_host(rows):
        return rows.to_sparse(1)
    present = (rows != 0).any(-1)
    places = torch.argsort((~present).to(torch.uint8), stable=True)
    too_many = torch.arange(len(rows), device=rows.device) >= present.sum()
    values = rows.index_select(0, places).masked_fill_(too_many.unsqueeze(-1), 0)
    places = torch.where(too_many, places[0], places)
    return torch.sparse_coo_tensor(
        places.unsqueeze(0), values, rows.shape, dtype=rows.dtype, device=rows.device, check_invariants=False
    )


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
