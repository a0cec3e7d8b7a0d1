"""Sums of products in Einstein's notation, computed as the products of a weight and an input that they are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfdist.curvature.blocks.bare import folded


def as_product(
    args: Sequence[Any], kwargs: Mapping[str, Any], is_weight: Callable[[Tensor], bool]
) -> Callable[[], Tensor] | None:
    """Returns what computes an einsum of an input and a matrix, or a stack of them, as a product; None for other sums.

    Every letter of the input but the one that is summed over must be in the output, and the matrix's other ones: each
    matrix of a stack meets a part of the input of its own, or all of it (`btd,hdk->bhtk`). One of three letters, none
    of which is both in the input and in the output, is a matrix with two letters for its rows or columns
    (`ibh,hnd->ibnd`).
    """
    if kwargs or not args or not isinstance(args[0], str):
        return None
    operands = list(args[1]) if len(args) == 2 and isinstance(args[1], (list, tuple)) else list(args[1:])
    inputs, _, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(operands) != 2 or len(terms) != 2 or not output:
        return None
    if is_weight(operands[0]):
        operands, terms = operands[::-1], terms[::-1]
    x, weight = operands
    if is_weight(x) or not is_weight(weight) or weight.dim() not in (2, 3) or not terms[1].isalpha():
        return None
    unnamed = x.dim() - len(terms[0].replace("...", ""))
    letters, wanted = _letters(terms[0], unnamed), _letters(output, unnamed)
    fold = folded(terms[1], "".join(letters), "".join(wanted)) if weight.dim() == 3 else 0
    if fold and weight.is_contiguous():
        return _of_folded(x, weight, fold, letters, terms[1], wanted)
    stacks, matrix = list(terms[1][:-2]), list(terms[1][-2:])
    summed = [letter for letter in matrix if letter in letters and letter not in wanted]
    made = [letter for letter in matrix if letter in wanted and letter not in letters]
    if len(summed) != 1 or len(made) != 1 or any(letter not in wanted for letter in stacks):
        return None
    shared = [letter for letter in stacks if letter in letters]
    kept = [letter for letter in letters if letter not in (*shared, *summed)]
    found = [*stacks, *kept, *made]
    if len(set(found)) != len(letters) + len(stacks) - len(shared) or sorted(found) != sorted(wanted):
        return None
    if stacks and not kept:
        return None
    straight = weight.mT if matrix[0] == summed[0] else weight

    def compute() -> Tensor:
        rows = x.permute([letters.index(letter) for letter in (*shared, *kept, *summed)])
        if not stacks:
            y = F.linear(rows, straight)
        else:  # a stack has one letter
            positions = rows.shape[len(shared) : -1]
            y = torch.matmul(rows.flatten(len(shared), -2), straight.mT).unflatten(1, positions)
        return y.permute([found.index(letter) for letter in wanted])

    return compute


def _of_folded(
    x: Tensor, weight: Tensor, fold: int, letters: Sequence[str], matrix: str, wanted: Sequence[str]
) -> Callable[[], Tensor] | None:
    """Returns what computes the product of an input and a matrix whose rows have `fold` letters."""
    first, last = matrix[:fold], matrix[fold:]
    summed, made = (first, last) if first[0] in letters else (last, first)
    kept = [letter for letter in letters if letter not in summed]
    found = [*kept, *made]
    if len(set(letters)) != len(letters) or sorted(found) != sorted(wanted) or not set(summed) <= set(letters):
        return None

    def compute() -> Tensor:
        rows = x.permute([letters.index(letter) for letter in (*kept, *summed)]).flatten(len(kept))
        straight = weight.reshape(weight.shape[:fold].numel(), -1)
        y = F.linear(rows, straight.mT if summed == first else straight)
        sizes = weight.shape[fold:] if summed == first else weight.shape[:fold]
        return y.unflatten(-1, sizes).permute([found.index(letter) for letter in wanted])

    return compute


def _letters(term: str, unnamed: int) -> list[str]:
    """Names an operand's dimensions, those that "..." stands for by numbers."""
    before, dots, after = term.partition("...")
    return [*before, *map(str, range(unnamed if dots else 0)), *after]
