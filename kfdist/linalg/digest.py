"""A digest of parameters that is exact, cheap, and never leaves the device."""

from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor

_ODD = (0x5851F42D4C957F2D, 0x14057B7EF767814F)
_WITHOUT_SIGN = (1 << 35) - 1


def parameter_digest(tensors: Iterable[Tensor]) -> Int64[Tensor, ""]:
    """Returns a number on the tensors' device that differs when any bit of any tensor does, almost surely.

    Integer arithmetic modulo 2^64 is exact and does not depend on the order of summation, so equal bits give equal
    digests on any device and thread count. Each 8-byte (or the last, shorter) word is multiplied by an odd weight that
    depends on its place, so a change of one word is always seen. Not cryptographic: it finds accidents, not attacks.
    """
    total: Tensor | None = None
    for index, tensor in enumerate(tensors):
        words = _words(tensor.detach())
        places = torch.arange(index + 1, index + 1 + words.numel(), dtype=torch.int64, device=words.device)
        weights = places * _ODD[0] + (index * 2 + 1)
        mixed = words ^ ((words >> 29) & _WITHOUT_SIGN)  # a logical shift: then it is one-to-one
        own = (mixed * (weights | 1)).sum() + _wrapped(_ODD[1] * (index + 1))
        total = own if total is None else total * 31 + own
    return torch.zeros((), dtype=torch.int64, device="cpu") if total is None else total


def _words(tensor: Tensor) -> Int64[Tensor, " words"]:
    flat = tensor.contiguous().view(-1)
    raw = flat.view(torch.uint8)
    rest = -raw.numel() % 8
    if rest:
        raw = torch.cat([raw, raw.new_zeros(rest)])
    elif raw.storage_offset() % 8:  # a view into a flat buffer, as cuDNN's recurrent layers have
        raw = raw.clone()
    return raw.view(torch.int64)


def _wrapped(value: int) -> int:
    """Returns what is left of a Python integer modulo 2^64, as the int64 that tensors can be computed with."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value
