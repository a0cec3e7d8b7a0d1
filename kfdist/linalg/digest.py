"""A digest of parameters that is exact, cheap, and never leaves the device."""

from collections.abc import Iterable
from functools import reduce

import torch
from jaxtyping import Int64
from torch import Tensor

_ODD = (0x5851F42D4C957F2D, 0x14057B7EF767814F)
_WITHOUT_SIGN = (1 << 35) - 1

_AT_ONCE = {"cpu": 2**18, "": 2**22}
"""Words of a tensor that are mixed at once, by device. There are twice as many numbers on the way, which of a language
model's whole table would be more memory than a training has left."""


def parameter_digest(tensors: Iterable[Tensor]) -> Int64[Tensor, ""]:
    """Returns a number on the tensors' device that differs when any bit of any tensor does, almost surely.

    Integer arithmetic modulo 2^64 is exact and does not depend on the order of summation, so equal bits give equal
    digests on any device and thread count. Each 8-byte (or the last, shorter) word is multiplied by an odd weight that
    depends on its place, so a change of one word is always seen. Not cryptographic: it finds accidents, not attacks.
    """
    total: Tensor | None = None
    for index, tensor in enumerate(tensors):
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        at_once = _AT_ONCE.get(raw.device.type, _AT_ONCE[""])
        pieces = enumerate(raw.split(8 * at_once))
        sums = [_mixed_sum(_words(piece), index + 1 + number * at_once, index) for number, piece in pieces]
        own = reduce(torch.add, sums) + _wrapped(_ODD[1] * (index + 1))
        total = own if total is None else total * 31 + own
    return torch.zeros((), dtype=torch.int64, device="cpu") if total is None else total


def _mixed_sum(words: Int64[Tensor, " words"], place: int, index: int) -> Int64[Tensor, ""]:
    """Sums words of the tensor `index` times their weights; the first of them is at `place`."""
    weights = torch.arange(place, place + words.numel(), dtype=torch.int64, device=words.device)
    weights.mul_(_ODD[0]).add_(index * 2 + 1).bitwise_or_(1)
    mixed = (words >> 29).bitwise_and_(_WITHOUT_SIGN).bitwise_xor_(words)  # a logical shift: then it is one-to-one
    return mixed.mul_(weights).sum()


def _words(raw: Tensor) -> Int64[Tensor, " words"]:
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
