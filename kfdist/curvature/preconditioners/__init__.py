"""Inverted blocks as plain data: frozen tensors with a fast `apply`.

A new kind is a frozen dataclass of tensors (and a few static values) and one line in `PRECONDITIONERS`.
"""

from kfdist.curvature.inverse import AbstractPreconditioner as AbstractPreconditioner
from kfdist.curvature.inverse import Memory as Memory
from kfdist.curvature.kronecker_inverse import KroneckerInverse as KroneckerInverse
from kfdist.curvature.kronecker_inverse import KroneckerSpectrum as KroneckerSpectrum
from kfdist.curvature.preconditioners.conjugate_gradient import ConjugateGradient as ConjugateGradient
from kfdist.curvature.preconditioners.ekfac_inverse import EkfacBasis as EkfacBasis
from kfdist.curvature.preconditioners.eva_inverse import EvaPreconditioner as EvaPreconditioner
from kfdist.curvature.preconditioners.seng_directions import SengExplicit as SengExplicit
from kfdist.curvature.preconditioners.seng_directions import SengImplicit as SengImplicit
from kfdist.curvature.preconditioners.tridiagonal_inverse import ChainLink as ChainLink
from kfdist.curvature.preconditioners.two_level_inverse import TwoLevelBlock as TwoLevelBlock

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
