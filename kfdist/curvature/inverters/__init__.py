"""The methods, one file each with both halves: how a block is inverted, and what comes of it.

A new method is a file, a line in `INVERTERS` and, where its result is of a new kind, a line in
`PRECONDITIONERS`.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from kfdist.checks import suggestion
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerInverse, KroneckerSpectrum
from kfdist.curvature.inverter import AbstractInverter
from kfdist.curvature.inverters.b_kfac import BKfac, BKfacC, BRKfac
from kfdist.curvature.inverters.cg_fac import CgFac, ConjugateGradient
from kfdist.curvature.inverters.ekfac import Ekfac, EkfacBasis
from kfdist.curvature.inverters.ekfac_adam import AdamBasis, EkfacAdam
from kfdist.curvature.inverters.eva import Eva, EvaPreconditioner
from kfdist.curvature.inverters.kfac import Kfac, KfacEigen
from kfdist.curvature.inverters.kfac_diagonal import DiagonalInverse, KfacDiagonal
from kfdist.curvature.inverters.kfac_tridiagonal import ChainLink, KfacTridiagonal
from kfdist.curvature.inverters.kl_shampoo import KlBasis, KlShampoo
from kfdist.curvature.inverters.rs_kfac import RsKfac, SreKfac
from kfdist.curvature.inverters.seng import Seng
from kfdist.curvature.inverters.seng_directions import SengExplicit, SengImplicit
from kfdist.curvature.inverters.shampoo import ModeRoots, Shampoo
from kfdist.curvature.inverters.soap import ModeBasis, Soap
from kfdist.curvature.inverters.two_level import TwoLevel, TwoLevelBlock
from kfdist.curvature.inverters.unit_wise import UnitWise, UnitWiseInverse
from kfdist.errors import ConfigError

INVERTERS: Mapping[str, type[AbstractInverter]] = {
    "kfac": Kfac,
    "kfac-eigen": KfacEigen,
    "kfac-tridiagonal": KfacTridiagonal,
    "ekfac": Ekfac,
    "ekfac-adam": EkfacAdam,
    "rs-kfac": RsKfac,
    "sre-kfac": SreKfac,
    "b-kfac": BKfac,
    "b-r-kfac": BRKfac,
    "b-kfac-c": BKfacC,
    "cg-fac": CgFac,
    "seng": Seng,
    "eva": Eva,
    "two-level": TwoLevel,
    "shampoo": Shampoo,
    "soap": Soap,
    "kl-shampoo": KlShampoo,
}
"""Every method that can be chosen, by its name in configurations and jobs."""

FIXED: Mapping[str, type[AbstractInverter]] = {"unit-wise": UnitWise, "kfac-diagonal": KfacDiagonal}
"""The methods of blocks that leave no choice, by name; nobody else can have them."""

PRECONDITIONERS: Mapping[str, type[AbstractPreconditioner]] = {
    "kronecker-inverse": KroneckerInverse,
    "kronecker-spectrum": KroneckerSpectrum,
    "chain-link": ChainLink,
    "two-level-block": TwoLevelBlock,
    "unit-wise-inverse": UnitWiseInverse,
    "diagonal-inverse": DiagonalInverse,
    "conjugate-gradient": ConjugateGradient,
    "ekfac-basis": EkfacBasis,
    "adam-basis": AdamBasis,
    "eva": EvaPreconditioner,
    "seng-explicit": SengExplicit,
    "seng-implicit": SengImplicit,
    "mode-roots": ModeRoots,
    "mode-basis": ModeBasis,
    "kl-basis": KlBasis,
}
"""Every kind of result by its name on the wire and in checkpoints."""


def make_inverter(name: str, /, **settings: Any) -> AbstractInverter:
    """Makes an inverter from its name and settings.

    Args:
        name: A key of `INVERTERS`.
        **settings: Fields of the inverter; what is left out keeps its default.

    Raises:
        ConfigError: Unknown name or setting, or a value that isn't allowed.
    """
    if not isinstance(name, str):
        raise ConfigError(f"is {name!r}; a method's name is needed, such as 'rs-kfac'", path="method")
    if name in ("auto", "by-width"):
        raise ConfigError(
            f"{name} isn't an inverter, it chooses one per block; give it as a Preconditioner's method, or use "
            "kfdist.curvature.auto.make_choice",
            path="method",
        )
    if name not in INVERTERS:
        raise ConfigError(f"unknown method {name!r}{allowed(name, [*INVERTERS, 'auto', 'by-width'])}", path="method")
    cls = INVERTERS[name]
    check_settings(name, cls, settings)
    return cls(**settings)


def check_settings(name: str, cls: type, settings: Mapping[str, Any]) -> None:
    """Refuses settings that aren't fields of the method's class.

    Args:
        name: The method's name.
        cls: The dataclass of its settings.
        settings: By name, as given.

    Raises:
        ConfigError: One is unknown.
    """
    known = [f.name for f in fields(cls)]
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"{name} has no setting {setting!r}{allowed(setting, known)}", path="settings")


def allowed(word: str, known: list[str]) -> str:
    """Returns the end of a sentence about a word that isn't known: what is near it, and what there is."""
    return f"{suggestion(word, known) or ';'} {'allowed are ' + ', '.join(known) if known else 'it has none'}"
