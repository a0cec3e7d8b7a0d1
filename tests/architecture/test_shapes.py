"""Public functions of the mathematics say the shapes of their tensors, and the suite checks them at every call."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from kfdist.linalg.psd import eigen_residual, symmetrise
from tests.support.shapes import PACKAGES, checked

ANY_SHAPE = {"parameter_digest"}
"""Functions of tensors whose shapes don't matter."""


def public_functions() -> Iterator[tuple[str, Any]]:
    for package in PACKAGES:
        for found in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            module = importlib.import_module(found.name)
            classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == found.name]
            for holder in (module, *classes):
                for name, member in vars(holder).items():
                    function = getattr(member, "fget", getattr(member, "__func__", member))
                    own = inspect.isfunction(function) and function.__module__ == found.name
                    if own and not name.startswith("_") and name not in ANY_SHAPE:
                        yield f"{holder.__name__}.{name}", function


def bare_tensors(hint: Any) -> bool:
    if get_origin(hint) in (dict, Mapping):
        return False  # tensors by name, of as many shapes
    inner = hint if isinstance(hint, list) else get_args(hint)  # a list: the arguments of a callable
    return hint is Tensor or any(bare_tensors(each) for each in inner)


def test_no_tensor_is_without_a_shape() -> None:
    found = {name: inspect.signature(function) for name, function in public_functions()}
    assert found
    bare = [
        name
        for name, signature in found.items()
        if any(map(bare_tensors, [signature.return_annotation, *(p.annotation for p in signature.parameters.values())]))
    ]
    assert not bare


def test_a_wrong_shape_is_refused_at_the_call() -> None:
    with pytest.raises(TypeCheckError, match="symmetrise"):
        symmetrise(torch.zeros(2, 3))
    square, one = torch.eye(3)[None], torch.ones(1, 3)
    eigen_residual(square, one, square, square)
    with pytest.raises(TypeCheckError, match="vectors"):
        eigen_residual(square, one, square[..., :2], square)


def test_a_wrong_result_is_refused_though_arguments_of_these_shapes_have_passed() -> None:
    wrong = False

    def doubled(x: Float[Tensor, "n d"], *, why: str = "") -> Float[Tensor, "n d"]:  # noqa: ARG001
        return (x if not wrong else x.mT) * 2

    looked_at = checked(doubled)
    for _ in range(2):
        assert looked_at(torch.ones(2, 3), why="any").shape == (2, 3)
    wrong = True
    with pytest.raises(TypeCheckError, match="return value"):
        looked_at(torch.ones(2, 3))
    with pytest.raises(TypeCheckError, match="parameters"):
        looked_at(torch.ones(2))
    with pytest.raises(TypeCheckError, match="parameters"):
        looked_at(torch.ones(2, 3, dtype=torch.int64))
    assert looked_at(torch.ones(3, 3)).shape == (3, 3)


def test_a_result_is_refused_that_another_numbers_shape_would_have_been() -> None:
    def cut(columns: Float[Tensor, "c d"], width: int) -> Float[Tensor, "c {width}"]:
        return columns[:, : min(width, 3)]

    looked_at = checked(cut)
    looked_at(torch.zeros(2, 9), 3)
    with pytest.raises(TypeCheckError, match="cut"):
        looked_at(torch.zeros(2, 9), 5)
