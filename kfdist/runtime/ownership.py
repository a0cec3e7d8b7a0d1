"""Which Preconditioner has a parameter: two of them would precondition its gradient twice."""

import gc
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from kfdist.errors import ConfigError

_owners: dict[int, "weakref.ref[Any]"] = {}
"""By id of the parameter, which lives as long as its owner does."""


class Ownership:
    """The parameters of one owner, until it gives them up or is forgotten.

    Args:
        parameters: By the names that a refusal shows.

    Raises:
        ConfigError: Another one has some of them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        if self._taken():
            gc.collect()  # the other one may be forgotten already, in a circle of references
        if taken := self._taken():
            raise ConfigError(
                f"{len(taken)} of the parameters ({taken[0]!r}, ...) are another Preconditioner's, which is still "
                "open, and gradients would be preconditioned twice; close() it first (in a notebook, where this cell "
                "ran before: preconditioner.close()), or leave its layers out by skip=..."
            )
        own = weakref.ref(self)
        _owners.update({id(parameter): own for parameter in self._parameters.values()})
        self._finalizer = weakref.finalize(self, _give_up, own, [id(each) for each in self._parameters.values()])
        self._finalizer.atexit = False

    def give_up(self) -> None:
        """Others may have them; safe to call twice."""
        self._finalizer()

    def _taken(self) -> list[str]:
        return [name for name, each in self._parameters.items() if (own := _owners.get(id(each))) and own() is not None]


def _give_up(own: "weakref.ref[Any]", parameters: list[int]) -> None:
    for parameter in parameters:
        if _owners.get(parameter) is own:
            del _owners[parameter]
