"""SRE-KFAC: K-FAC with factors by a randomised symmetric eigendecomposition (Puiu, arXiv 2206.15397)."""

from dataclasses import dataclass
from typing import ClassVar

from kfdist.curvature.inverters.rs_kfac import AbstractSketchedKfac
from kfdist.curvature.spectra import Decomposition


@dataclass(frozen=True, kw_only=True)
class SreKfac(AbstractSketchedKfac):
    """The projected eigendecomposition: Q^T M Q = Z diag(w) Z^T, U = Q Z (algorithms.md 3.2).

    Cheaper than `rs-kfac`, and less accurate, because the projection is from both sides.
    """

    name: ClassVar[str] = "sre-kfac"
    decomposition: ClassVar[Decomposition] = "srevd"
