"""Models and data of the user's own, named in a configuration as "package.module:function"."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kfdist.checks import suggestion
from kfdist.errors import ConfigError

T = TypeVar("T")


def is_own(name: str) -> bool:
    """Tells whether a name is the path of a function of the user's."""
    return ":" in name


def own_function(name: str, *, section: str) -> Callable[..., Any]:
    """Imports a function by its path; modules are looked for where Python does, then in the working directory.

    Args:
        name: Such as "package.module:function".
        section: The configuration section it stands in, for messages.

    Raises:
        ConfigError: There is no such module or function, or the import fails.
    """
    path = f"{section}.name"
    module_name, _, function_name = name.partition(":")
    if not function_name.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f'is {name!r}; write "package.module:function"', path=path)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: a file named like a module of Python's must not take its place
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"is {name!r}; importing {module_name} failed: {error}", path=path) from error
        raise ConfigError(
            f"is {name!r}; there is no module {error.name!r}: it must be installed, on PYTHONPATH, or in the working "
            f"directory, {os.getcwd()}",
            path=path,
        ) from None
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"is {name!r}; importing {module_name} failed: {error}", path=path) from error
    function = getattr(module, function_name, None)
    if function is None:
        known = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        near = suggestion(function_name, known) or ";"
        where = f"the module {module_name} ({getattr(module, '__file__', 'built in')})"
        raise ConfigError(f"is {name!r}{near} {where} has no {function_name!r}", path=path)
    if not callable(function):
        raise ConfigError(f"is {name!r}, of type {type(function).__name__}; it must be a function", path=path)
    return function


def own_result(
    function: Callable[..., Any], settings: Mapping[str, Any], *, wanted: type[T], section: str, **given: Any
) -> T:
    """Calls a function of the user's with what kfdist gives and the settings, and checks what it returns.

    What the function raises goes through, so that its stack is seen; a ConfigError gets a path.

    Args:
        function: The function.
        settings: The `settings` as configured; its keyword arguments.
        wanted: What it must return.
        section: The configuration section, for messages.
        **given: What kfdist gives, by keyword.

    Raises:
        ConfigError: It takes other arguments, or returns something else.
    """
    try:
        inspect.signature(function).bind(**given, **settings)
    except TypeError as error:
        parameters = inspect.signature(function).parameters
        missing = [name for name in given if name not in parameters]
        takes = f"{function.__qualname__} takes: {', '.join(parameters) or 'nothing'}"
        if missing and "unexpected keyword" in str(error):
            wanted_by = f"it is given {', '.join(given)}, and the settings, by keyword"
            raise ConfigError(f"{takes}; {wanted_by}; add {', '.join(missing)}", path=f"{section}.name") from None
        raise ConfigError(f"is {dict(settings)!r}: {error}; {takes}", path=f"{section}.settings") from None
    try:
        result = function(**given, **settings)
    except ConfigError as error:
        raise error if error.path else error.at(f"{section}.name") from None
    if not isinstance(result, wanted):
        raise ConfigError(
            f"{function.__module__}:{function.__qualname__} returned a value of type {type(result).__name__}; it must "
            f"return a {wanted.__module__}.{wanted.__qualname__}",
            path=f"{section}.name",
        )
    return result
