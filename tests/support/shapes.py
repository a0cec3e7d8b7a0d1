"""Checks at every call the shapes that annotations such as `Float[Tensor, "c p q"]` claim."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
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
    return _checked_once(function, shapes)


def _checked_once(function: FunctionType, shapes: dict[str, Any]) -> Callable[..., Any]:
    """Has a call looked at unless one of the same shapes has passed: a look takes a few tenths of a millisecond."""
    held: list[Any] = []
    lock = threading.Lock()

    @functools.wraps(function)
    def held_result(*_args: Any, **_kwargs: Any) -> Any:
        return held.pop()

    @functools.cache  # made at the first call: making all takes longer than most processes use them
    def looked_at(what: Callable[..., Any]) -> Callable[..., Any]:
        hints = function.__annotations__
        function.__annotations__ = shapes
        try:
            return jaxtyped(typechecker=beartype)(what)
        finally:
            function.__annotations__ = hints

    parameters = inspect.signature(function).parameters.values()
    if any(each.name in shapes and each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters):
        return looked_at(function)
    places = [place for place, each in enumerate(parameters) if each.name in shapes]
    # Numbers that shapes name, as "{width}" does.
    numbers = {place: each.name for place, each in enumerate(parameters) if f"{{{each.name}" in str(shapes)}
    returns = "return" in shapes
    passed: set[Hashable] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        count = len(args)
        by_place = tuple([_outline(args[place]) for place in places if place < count])
        by_name = tuple([(name, _outline(each)) for name, each in kwargs.items() if name in shapes])
        named = tuple([args[place] if place < count else kwargs.get(name) for place, name in numbers.items()])
        given = by_place, by_name, named
        known = given in passed
        result = function(*args, **kwargs) if known else looked_at(function)(*args, **kwargs)
        both = given, _outline(result) if returns else None
        if known and both in passed:  # as nearly always
            return result
        if known:
            with lock:
                held.append(result)
                looked_at(held_result)(*args, **kwargs)
        passed.update((given, both))
        return result

    return call


def _outline(value: Any) -> Hashable:
    """Returns what annotations of shapes look at in a value; what equals nothing else where that isn't known."""
    if hasattr(value, "dtype"):
        return type(value), value.dtype, value.shape
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_outline, value))
    if isinstance(value, dict):
        return dict, tuple((key, _outline(each)) for key, each in value.items())
    return type(value) if value is None or isinstance(value, int | float | str) else object()


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
