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


@dataclass(frozen=True, kw_only=True)
class ByWidth:
    """Chooses a method of eigenbases for matrices up to a width, `rs-kfac` up to another; nothing else has a block.

    Attributes:
        dense: The method of the narrower ones.
        eigen: The largest dimension of those; a factor of 1,024 is decomposed as a whole in less than a second.
        sketched: The largest dimension that has a dense factor: 128 MiB in float32, where the head of a language model
            would have one of 10 GB.

    Raises:
        ConfigError: A width is out of range, or the method is one on gradients.
    """

    dense: AbstractInverter = field(default_factory=KfacEigen)
    eigen: int = 1024
    sketched: int = 8192

    def __post_init__(self) -> None:
        if isinstance(self.dense, AbstractGradientInverter):
            raise ConfigError(
                f"is {self.dense.name}, which takes whole parameters, whatever their width; give it as `method`, or to "
                "patterns of a table",
                path="dense",
            )
        checks.count("eigen", self.eigen, least=1)
        checks.count("sketched", self.sketched, least=self.eigen)

    @classmethod
    def by_names(
        cls, *, dense: str = KfacEigen.name, dense_settings: Mapping[str, Any] | None = None, **widths: Any
    ) -> Self:
        """Makes one as a configuration writes it.

        Args:
            dense: The name of the method of the narrower ones.
            dense_settings: Its settings; what is left out keeps its default.
            **widths: `eigen` and `sketched`.

        Raises:
            ConfigError: Unknown name or setting, or a value that isn't allowed.
        """
        known = ("dense", "dense_settings", "eigen", "sketched")
        for name in widths.keys() - set(known):
            raise ConfigError(f"{BY_WIDTH} has no setting {name!r}{allowed(name, list(known))}", path="settings")
        if dense_settings is not None and not isinstance(dense_settings, Mapping):
            raise ConfigError(f"is {dense_settings!r}; a table of settings is needed", path="dense_settings")
        try:
            inverter = make_inverter(dense, **(dense_settings or {}))
        except ConfigError as error:
            places = {"method": "dense", "settings": "dense_settings"}
            raise error.at(places.get(error.path, f"dense_settings.{error.path}")) from None
        return cls(dense=inverter, **widths)

    def choose(self, block: Block) -> tuple[AbstractInverter, str] | str:
        """Returns the method and why, or why there is none; of the block alone."""
        width = max(block.shape.d_in - block.homogeneous, block.shape.d_out)  # without the bias's coordinate
        if isinstance(block, UnitBlock | EmbeddingBlock) or width > self.sketched:
            return FIRST_ORDER
        if width <= self.eigen:
            return self.dense, f"{width} wide, of at most {self.eigen}"
        return RsKfac(), f"{width} wide, of more than {self.eigen}"
