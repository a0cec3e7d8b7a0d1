"""Checks at every call the shapes that annotations such as `Float[Tensor, "c p q"]` claim."""

import inspect
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, jaxtyped

PACKAGES = ("kfdist.linalg", "kfdist.curvature")


def check_shapes() -> None:
    """Has the functions of `PACKAGES` checked that are imported from now on in this process."""
    sys.meta_path.insert(0, _Finder())


def checked(function: FunctionType) -> Any:
    """Returns the function with beartype looking at those of its annotations that say shapes; itself without any.

    The others are left alone: settings of a wrong type are the code's own to refuse, which is tested.
    """
    hints = function.__annotations__
    shapes = {name: hint for name, hint in hints.items() if _says_shape(hint)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    try:
        return jaxtyped(typechecker=beartype)(function)
    finally:
        function.__annotations__ = hints


def _says_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_says_shape(each) for each in get_args(hint))


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not f"{fullname}.".startswith(tuple(f"{package}." for package in PACKAGES)):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for holder in [module, *(each for each in vars(module).values() if inspect.isclass(each))]:
            if holder is module or holder.__module__ == module.__name__:
                _check_members(holder, module.__name__)


def _check_members(holder: Any, module: str) -> None:
    for name, member in [(name, member) for name, member in vars(holder).items() if not name.startswith("_")]:
        if isinstance(member, classmethod | staticmethod):
            setattr(holder, name, type(member)(checked(member.__func__)))
        elif isinstance(member, property):
            setattr(holder, name, property(checked(member.fget), doc=member.__doc__))
        elif isinstance(member, FunctionType) and member.__module__ == module:
            setattr(holder, name, checked(member))
