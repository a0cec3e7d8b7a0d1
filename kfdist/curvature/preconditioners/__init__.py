"""Inverted blocks as plain data: frozen tensors with a fast `apply`.

A new kind is a frozen dataclass of tensors (and a few static values) and one line in `PRECONDITIONERS`.
"""

from kfdist.curvature.preconditioners.base import AbstractPreconditioner as AbstractPreconditioner
from kfdist.curvature.preconditioners.base import Memory as Memory
from kfdist.curvature.preconditioners.conjugate_gradient import ConjugateGradient as ConjugateGradient
from kfdist.curvature.preconditioners.ekfac import EkfacBasis as EkfacBasis
from kfdist.curvature.preconditioners.eva import EvaPreconditioner as EvaPreconditioner
from kfdist.curvature.preconditioners.kronecker import KroneckerInverse as KroneckerInverse
from kfdist.curvature.preconditioners.kronecker import KroneckerSpectrum as KroneckerSpectrum
from kfdist.curvature.preconditioners.seng import SengExplicit as SengExplicit
from kfdist.curvature.preconditioners.seng import SengImplicit as SengImplicit
from kfdist.curvature.preconditioners.tridiagonal import ChainLink as ChainLink
from kfdist.curvature.preconditioners.two_level import TwoLevelBlock as TwoLevelBlock

PRECONDITIONERS: dict[str, type[AbstractPreconditioner]] = {
    "kronecker-inverse": KroneckerInverse,
    "kronecker-spectrum": KroneckerSpectrum,
    "chain-link": ChainLink,
    "two-level-block": TwoLevelBlock,
    "conjugate-gradient": ConjugateGradient,
    "ekfac-basis": EkfacBasis,
    "eva": EvaPreconditioner,
    "seng-explicit": SengExplicit,
    "seng-implicit": SengImplicit,
}
"""Every kind by its name on the wire and in checkpoints."""
