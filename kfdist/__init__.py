"""kfdist: distributed second-order training for PyTorch.

Importing this package does nothing and imports neither torch, ray nor grpc; a name is loaded at its first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kfdist.errors import KfdistError as KfdistError
    from kfdist.optim.adaptive import AdaptiveStep as AdaptiveStep
    from kfdist.optim.settings import AdaptiveReport as AdaptiveReport
    from kfdist.optim.settings import AdaptiveSettings as AdaptiveSettings
    from kfdist.runtime.pipeline_parts import FixedLag as FixedLag
    from kfdist.runtime.pipeline_parts import StepReport as StepReport
    from kfdist.runtime.preconditioner import Preconditioner as Preconditioner
    from kfdist.runtime.service import Service as Service
    from kfdist.runtime.service import connect as connect
    from kfdist.staleness import StalenessPolicy as StalenessPolicy

__version__ = "0.1.0"

_HOMES = {
    "AdaptiveReport": "kfdist.optim.settings",
    "AdaptiveSettings": "kfdist.optim.settings",
    "AdaptiveStep": "kfdist.optim.adaptive",
    "FixedLag": "kfdist.runtime.pipeline_parts",
    "KfdistError": "kfdist.errors",
    "Preconditioner": "kfdist.runtime.preconditioner",
    "Service": "kfdist.runtime.service",
    "StalenessPolicy": "kfdist.staleness",
    "StepReport": "kfdist.runtime.pipeline_parts",
    "connect": "kfdist.runtime.service",
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
