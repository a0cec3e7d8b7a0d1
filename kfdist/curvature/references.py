"""The dense float64 truth that the fast code is tested against. Slow on purpose: every formula is written out.

Convention: matrices are flattened row-major, the way tensors lie in memory, so that `(G (x) A) V.ravel() = (G V
A).ravel()` for V `[p, q]`, A `[q, q]`, G `[p, p]`. A block's dense matrix is `[c, p q, p q]`: one per group of a
convolution, since different groups are different blocks of a block-diagonal matrix.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from kfdist.curvature.blocks import Block
from kfdist.curvature.statistics import KroneckerFactors, Samples
from kfdist.linalg.kronecker import RELATIVE_FLOOR


def per_example_gradients(block: Block, losses: Float[Tensor, " N"]) -> Float64[Tensor, "N c p q"]:
    """Differentiates each example's own loss in the block's parameters with autograd, one at a time."""
    shape = block.shape
    gradients = [block.to_matrix(torch.autograd.grad(loss, block.parameters(), retain_graph=True)) for loss in losses]
    return torch.stack(gradients).double().reshape(-1, shape.groups, shape.d_out, shape.d_in)


def empirical_fisher(gradients: Float[Tensor, "N c p q"]) -> Float64[Tensor, "c p*q p*q"]:
    """Returns (1/N) sum_n vec(g_n) vec(g_n)^T of per-example gradients."""
    rows = gradients.double().flatten(2).transpose(0, 1)
    return rows.mT @ rows / rows.shape[1]


def softmax_fisher(block: Block, logits: Float[Tensor, "N classes"]) -> Float64[Tensor, "c pq pq"]:
    """Computes the exact Fisher block of a softmax classifier by enumerating the classes.

    (1/N) sum_n sum_c p_nc vec(d log p_nc) vec(d log p_nc)^T, p_nc held constant as the weight.
    """
    log_probabilities = torch.log_softmax(logits, dim=-1)
    n, classes = logits.shape
    fisher = torch.zeros((), dtype=torch.float64, device=logits.device)
    for label in range(classes):
        gradients = per_example_gradients(block, log_probabilities[:, label])
        weights = log_probabilities[:, label].detach().double().exp().sqrt()
        fisher = fisher + empirical_fisher(gradients * weights.view(n, 1, 1, 1))
    return fisher


def dense_kronecker(A: Float[Tensor, "c q q"], G: Float[Tensor, "c p p"]) -> Float64[Tensor, "c p*q p*q"]:
    """Returns the matrix of V -> G V A on row-major vectors, G (x) A, for every group."""
    return torch.stack([torch.kron(g.double(), a.double()) for a, g in zip(A, G, strict=True)])


def solve_dense(
    matrix: Float[Tensor, "c n n"], damping: float, gradient: Float[Tensor, "c p q"]
) -> Float64[Tensor, "c p q"]:
    """Computes (F + lambda I)^{-1} vec(V) with a dense solver."""
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    solution = torch.linalg.solve(matrix.double() + damping * identity, gradient.double().flatten(1).unsqueeze(-1))
    return solution.reshape(gradient.shape)


def damping_shares(
    A: Float[Tensor, "c q q"], G: Float[Tensor, "c p p"], *, rule: str, damping: float
) -> tuple[Float64[Tensor, " c"], Float64[Tensor, " c"]]:
    """Returns each factor's share of the damping, written out from algorithms.md 1.1 and 3.3 ("relative": of phi)."""
    shares: list[tuple[float, float]] = []
    floor = RELATIVE_FLOOR  # below it a factor counts as zero, and phi is taken as it is
    for a, g in zip(A.double(), G.double(), strict=True):
        if rule == "relative":
            top_a, top_g = (float(torch.linalg.eigvalsh(m)[-1]) for m in (a, g))
            shares.append((damping * (top_a if top_a > floor else 1), damping * (top_g if top_g > floor else 1)))
        else:
            mean_a, mean_g = float(a.trace()) / len(a), float(g.trace()) / len(g)
            pi = (mean_a / mean_g) ** 0.5 if mean_a > 0 and mean_g > 0 else 1.0
            shares.append((pi * damping**0.5, damping**0.5 / pi))
    first, second = (torch.tensor(each, dtype=torch.float64, device=A.device) for each in zip(*shares, strict=True))
    return first, second


def solve_factored_dense(
    A: Float[Tensor, "c q q"],
    G: Float[Tensor, "c p p"],
    shares: tuple[Float[Tensor, " c"], Float[Tensor, " c"]],
    gradient: Float[Tensor, "c p q"],
) -> Float64[Tensor, "c p q"]:
    """Computes ((G + lambda_G I) (x) (A + lambda_A I))^{-1} vec(V) with a dense solver on the whole product."""
    damped_A = A.double() + shares[0][:, None, None] * torch.eye(A.shape[-1], dtype=torch.float64, device=A.device)
    damped_G = G.double() + shares[1][:, None, None] * torch.eye(G.shape[-1], dtype=torch.float64, device=G.device)
    return solve_dense(dense_kronecker(damped_A, damped_G), 0.0, gradient)


def project_to_psd(matrix: Float[Tensor, "c d d"]) -> Float64[Tensor, "c d d"]:
    """Returns the nearest positive semi-definite matrices: negative eigenvalues set to zero, in float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return vectors @ torch.diag_embed(values.clamp_min(0)) @ vectors.mT


def leading_part(matrix: Float[Tensor, "c d d"], rank: int, *, continued: bool) -> Float64[Tensor, "c d d"]:
    """Returns the best rank-r approximation, from a full eigendecomposition.

    The d - r missing eigenvalues are 0 or, if `continued`, equal the r-th (spectrum continuation).
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    missing = max(0, matrix.shape[-1] - rank)
    if missing:
        values[..., :missing] = values[..., missing : missing + 1] if continued else 0.0
    return vectors @ torch.diag_embed(values) @ vectors.mT


def example_gradients(samples: Samples) -> Float64[Tensor, "n c p q"]:
    """Returns S_i = sum_t g_it a_it^T of every example."""
    a, g = samples.a.double(), samples.g.double()
    return torch.einsum("cntp,cntq->ncpq", g, a)


def weighted_fisher(samples: Samples) -> Float64[Tensor, "c pq pq"]:
    """Returns (1/N) sum_i weight_i vec(S_i) vec(S_i)^T on row-major vectors."""
    vectors, weight = example_gradients(samples).flatten(2), samples.weight.double()
    return torch.einsum("n,nci,ncj->cij", weight, vectors, vectors) / samples.examples


def factors_of_rows(samples: Samples) -> KroneckerFactors:
    """Returns Omega and Gamma of the rows, as `Samples` defines them."""
    a, g, weight = samples.a.double(), samples.g.double(), samples.weight.double()
    return KroneckerFactors(
        A=torch.einsum("n,cnti,cntj->cij", weight, a, a) / samples.examples,
        G=torch.einsum("n,cnti,cntj->cij", weight, g, g) / (weight * samples.positions).sum(),
    )
