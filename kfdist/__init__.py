"""kfdist: distributed second-order training for PyTorch.

Importing this package does nothing and imports neither torch, ray nor grpc; a name is loaded at its first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfdist.capture.requests import Sampling as Sampling
    from kfdist.curvature.auto import Auto as Auto
    from kfdist.curvature.by_width import ByWidth as ByWidth
    from kfdist.curvature.inverters import BKfac as BKfac
    from kfdist.curvature.inverters import BKfacC as BKfacC
    from kfdist.curvature.inverters import BRKfac as BRKfac
    from kfdist.curvature.inverters import CgFac as CgFac
    from kfdist.curvature.inverters import Ekfac as Ekfac
    from kfdist.curvature.inverters import EkfacAdam as EkfacAdam
    from kfdist.curvature.inverters import Eva as Eva
    from kfdist.curvature.inverters import Kfac as Kfac
    from kfdist.curvature.inverters import KfacEigen as KfacEigen
    from kfdist.curvature.inverters import KfacTridiagonal as KfacTridiagonal
    from kfdist.curvature.inverters import KlShampoo as KlShampoo
    from kfdist.curvature.inverters import RsKfac as RsKfac
    from kfdist.curvature.inverters import Seng as Seng
    from kfdist.curvature.inverters import Shampoo as Shampoo
    from kfdist.curvature.inverters import Soap as Soap
    from kfdist.curvature.inverters import SreKfac as SreKfac
    from kfdist.curvature.inverters import TwoLevel as TwoLevel
    from kfdist.errors import CheckpointError as CheckpointError
    from kfdist.errors import ConfigError as ConfigError
    from kfdist.errors import EnvironmentFault as EnvironmentFault
    from kfdist.errors import Interrupted as Interrupted
    from kfdist.errors import KfdistError as KfdistError
    from kfdist.errors import KfdistWarning as KfdistWarning
    from kfdist.errors import LossNotFinite as LossNotFinite
    from kfdist.errors import ModelChanged as ModelChanged
    from kfdist.errors import RankFailed as RankFailed
    from kfdist.errors import RanksDiverged as RanksDiverged
    from kfdist.optim.adaptive import AdaptiveStep as AdaptiveStep
    from kfdist.optim.adaptive_settings import AdaptiveReport as AdaptiveReport
    from kfdist.optim.adaptive_settings import AdaptiveSettings as AdaptiveSettings
    from kfdist.optim.optimizer import Optimizer as Optimizer
    from kfdist.policies.staleness import Asap as Asap
    from kfdist.policies.staleness import FixedLag as FixedLag
    from kfdist.runtime.invert.service import Service as Service
    from kfdist.runtime.invert.service import connect as connect
    from kfdist.runtime.preconditioner import Preconditioner as Preconditioner
    from kfdist.runtime.settings import StepReport as StepReport

__version__ = "0.1.0"

_NAMES = {
    "kfdist.capture.requests": "Sampling",
    "kfdist.curvature.auto": "Auto",
    "kfdist.curvature.by_width": "ByWidth",
    "kfdist.curvature.inverters": "BKfac BKfacC BRKfac CgFac Ekfac EkfacAdam Eva Kfac KfacEigen "
    "KfacTridiagonal KlShampoo RsKfac Seng Shampoo Soap SreKfac TwoLevel",
    "kfdist.errors": "CheckpointError ConfigError EnvironmentFault Interrupted KfdistError KfdistWarning "
    "LossNotFinite ModelChanged RankFailed RanksDiverged",
    "kfdist.optim.adaptive": "AdaptiveStep",
    "kfdist.optim.adaptive_settings": "AdaptiveReport AdaptiveSettings",
    "kfdist.optim.optimizer": "Optimizer",
    "kfdist.policies.staleness": "Asap FixedLag",
    "kfdist.runtime.invert.service": "Service connect",
    "kfdist.runtime.preconditioner": "Preconditioner",
    "kfdist.runtime.settings": "StepReport",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use, so that `import kfdist` stays free of side effects."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kfdist' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    from kfdist.system.imports import uncollected

    with uncollected():
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
