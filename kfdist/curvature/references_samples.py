"""Dense float64 truth for methods that work on rows of single examples; see `kfdist.curvature.references`."""

import torch
from torch import Tensor

from kfdist.curvature.statistics import KroneckerFactors, Samples


def example_gradients(samples: Samples) -> Tensor:
    """Returns S_i = sum_t g_it a_it^T of every example, `[n, c, p, q]` in float64."""
    a, g = samples.a.double(), samples.g.double()
    return torch.einsum("cntp,cntq->ncpq", g, a)


def weighted_fisher(samples: Samples) -> Tensor:
    """Returns sum_i weight_i vec(S_i) vec(S_i)^T / sum_i weight_i on row-major vectors, `[c, p q, p q]`."""
    vectors, weight = example_gradients(samples).flatten(2), samples.weight.double()
    return torch.einsum("n,nci,ncj->cij", weight, vectors, vectors) / weight.sum()


def factors_of_rows(samples: Samples) -> KroneckerFactors:
    """Returns Omega and Gamma of the rows in float64, as `Samples` defines them."""
    a, g, weight = samples.a.double(), samples.g.double(), samples.weight.double()
    return KroneckerFactors(
        A=torch.einsum("n,cnti,cntj->cij", weight, a, a) / weight.sum(),
        G=torch.einsum("n,cnti,cntj->cij", weight, g, g) / (weight.sum() * samples.positions),
    )
