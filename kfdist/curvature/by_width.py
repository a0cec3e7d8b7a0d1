"""The methods that `kfdist.Optimizer` takes by itself: chosen by a block's kind and width, never by measured cost.

So a run that is resumed, also on another machine, chooses as it did when its checkpoint was written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from kfdist import checks
from kfdist.curvature.blocks import Block, EmbeddingBlock, UnitBlock
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverter import AbstractInverter
from kfdist.curvature.inverters import allowed, make_inverter
from kfdist.curvature.inverters.kfac import KfacEigen
from kfdist.curvature.inverters.rs_kfac import RsKfac
from kfdist.errors import ConfigError

BY_WIDTH = "by-width"
"""Its name as a method."""

FIRST_ORDER = "left to a first-order method: a table, a norm, a lone vector, or a matrix too wide for dense factors"

UNMULTIPLIED = "left to a first-order method: no product with it is found in its module's code"

BARE = "left to a first-order method: a bare parameter of rows and columns, as positions and scales are"


@dataclass(frozen=True, kw_only=True)
class ByWidth:
    """Chooses one method for matrices up to a width, another up to a second one; nothing else has a block.

    Attributes:
        dense: The method of matrices up to `eigen` wide.
        wide: The method of wider ones, up to `sketched`.
        eigen: A factor of 1,024, the default, is decomposed as a whole in less than a second.
        sketched: A factor of 8,192, the default, has 256 MiB in float32; a language model's head would have 10 GB.

    Raises:
        ConfigError: A width is out of range, or the method is one on gradients.
    """

    dense: AbstractInverter = field(default_factory=KfacEigen)
    wide: AbstractInverter = field(default_factory=RsKfac)
    eigen: int = 1024
    sketched: int = 8192

    def __post_init__(self) -> None:
        for name in ("dense", "wide"):
            inverter = getattr(self, name)
            if isinstance(inverter, AbstractGradientInverter):
                raise ConfigError(
                    f"is {inverter.name}, which takes whole parameters, whatever their width; give it as `method`, or "
                    "to patterns of a table",
                    path=name,
                )
        checks.count("eigen", self.eigen, least=1)
        checks.count("sketched", self.sketched, least=self.eigen)

    @classmethod
    def by_names(cls, **settings: Any) -> Self:
        """Makes one as a configuration writes it.

        Args:
            **settings: Fields of this class. `dense` and `wide` are names of methods, whose own settings are
                `dense_settings` and `wide_settings`. What is left out keeps its default.

        Raises:
            ConfigError: Unknown name or setting, or a value that isn't allowed.
        """
        known = ("dense", "dense_settings", "wide", "wide_settings", "eigen", "sketched")
        for name in settings.keys() - set(known):
            raise ConfigError(f"{BY_WIDTH} has no setting {name!r}{allowed(name, list(known))}", path="settings")
        made = {name: settings[name] for name in ("eigen", "sketched") if name in settings}
        for field_name, default in (("dense", KfacEigen.name), ("wide", RsKfac.name)):
            of_it = f"{field_name}_settings"
            if settings.keys() & {field_name, of_it}:
                made[field_name] = _named(settings.get(field_name, default), settings.get(of_it), field_name, of_it)
        return cls(**made)

    def choose(self, block: Block) -> tuple[AbstractInverter, str] | str:
        """Returns the method and why, or why there is none; of the block alone."""
        if isinstance(block, UnitBlock) and block.named_weight:
            return UNMULTIPLIED
        if isinstance(block, UnitBlock) and block.bare_matrix:
            return BARE
        width = max(block.shape.d_in - block.homogeneous, block.shape.d_out)  # without the bias's coordinate
        if isinstance(block, UnitBlock | EmbeddingBlock) or width > self.sketched:
            return FIRST_ORDER
        if width <= self.eigen:
            return self.dense, f"{width} wide, of at most {self.eigen}"
        return self.wide, f"{width} wide, of more than {self.eigen}"


def _named(name: str, settings: Any, field_name: str, of_it: str) -> AbstractInverter:
    """Makes a method by its name and settings, with the fields that they were given in as the paths of errors."""
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigError(f"is {settings!r}; a table of settings is needed", path=of_it)
    try:
        return make_inverter(name, **(settings or {}))
    except ConfigError as error:
        places = {"method": field_name, "settings": of_it}
        raise error.at(places.get(error.path, f"{of_it}.{error.path}")) from None
