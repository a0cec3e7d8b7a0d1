"""kfdist: distributed second-order training for PyTorch.

Importing this package does nothing and imports neither torch, ray nor grpc; a name is loaded at its first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfdist.errors import KfdistError as KfdistError
    from kfdist.optim.adaptive import AdaptiveStep as AdaptiveStep
    from kfdist.optim.adaptive_settings import AdaptiveReport as AdaptiveReport
    from kfdist.optim.adaptive_settings import AdaptiveSettings as AdaptiveSettings
    from kfdist.policies.staleness import StalenessPolicy as StalenessPolicy
    from kfdist.runtime.invert.service import Service as Service
    from kfdist.runtime.invert.service import connect as connect
    from kfdist.runtime.preconditioner import Preconditioner as Preconditioner
    from kfdist.runtime.settings import FixedLag as FixedLag
    from kfdist.runtime.settings import StepReport as StepReport

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveReport": "kfdist.optim.adaptive_settings",
    "AdaptiveSettings": "kfdist.optim.adaptive_settings",
    "AdaptiveStep": "kfdist.optim.adaptive",
    "FixedLag": "kfdist.runtime.settings",
    "KfdistError": "kfdist.errors",
    "Preconditioner": "kfdist.runtime.preconditioner",
    "Service": "kfdist.runtime.invert.service",
    "StalenessPolicy": "kfdist.policies.staleness",
    "StepReport": "kfdist.runtime.settings",
    "connect": "kfdist.runtime.invert.service",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use, so that `import kfdist` stays free of side effects."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kfdist' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
