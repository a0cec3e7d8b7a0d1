"""Other forms of what a step does with the directions of all blocks, beside the form in use; CPU time of one thread.

    python benchmarks/application_forms.py

The clip's products one dot a block, or all entries multiplied by one foreach and added up; the write-back one
multiplication a block into `.grad`, or one foreach multiplication and one foreach copy; blocks of equal shape and equal
numbers of eigenpairs one after another, or stacked, multiplied as one batch, and taken apart again; the products of
both sides one after the other, or the last two of the four as one of twice the depth; gradients of weight and bias
apart, or joined; a block whole, or some rows at a time.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfdist.linalg.kronecker import FactoredInverse, Spectrum

RESNET18 = [(64, 147), *[(64, 576)] * 4, (128, 576), *[(128, 1152)] * 3, (256, 1152), *[(256, 2304)] * 3]
RESNET18 += [(512, 2304), *[(512, 4608)] * 3, (128, 64), (256, 128), (512, 256)]
"""p and q of its convolutions; the head has a bias, as all of the GPT's have."""

GPT = [(384, 129, 32, 32), (128, 129, 32, 32), (512, 129, 64, 32), (128, 513, 32, 64)]
"""p, q, r_G and r_A of what each of the GPT's four layers has."""

LAYERS = 4

DEEP = [(1024, 785, 160, 128), (1024, 1025, 160, 192), (512, 4608, 128, 220)]
"""p, q, r_G and r_A of blocks whose products take long."""

WITH_BIAS = [(1024, 785, 64, 32), (1024, 1025, 64, 64), (384, 129, 32, 32), (512, 129, 32, 32)]
"""p, q, r_G and r_A of the MLP's two large blocks, and of two of the GPT's, at the default damping."""

ROWS = 256
"""Rows of a tile; of 784 numbers they are 0.8 MB."""

HALF = torch.tensor(0.5)


def milliseconds(run: Callable[[], object], repetitions: int = 15) -> float:
    """Returns the median CPU time of this thread."""
    run()
    found = []
    for _ in range(repetitions):
        begun = time.thread_time()
        run()
        found.append(1e3 * (time.thread_time() - begun))
    return sorted(found)[repetitions // 2]


def clip_and_write() -> dict[str, tuple[float, float]]:
    """Returns, of ResNet-18's blocks, both forms of the clip's products and of the write-back."""
    X, V = ([torch.randn(shape) for shape in RESNET18] for _ in range(2))
    scales = list(torch.ones(len(X)))  # what is multiplied in place stays as it is

    def write() -> None:
        for x, v, scale in zip(X, V, scales, strict=True):
            torch.mul(x, scale, out=v)

    def write_together() -> None:
        torch._foreach_mul_(X, scales)  # noqa: SLF001 the names that torch gives them
        torch._foreach_copy_(V, X)  # noqa: SLF001

    def clip() -> Tensor:
        return torch.stack([torch.dot(x.view(-1), v.view(-1)) for x, v in zip(X, V, strict=True)])

    def clip_together() -> Tensor:
        return torch.stack([each.sum() for each in torch._foreach_mul(X, V)])  # noqa: SLF001

    return {
        "clip": (milliseconds(clip), milliseconds(clip_together)),
        "write-back": (milliseconds(write), milliseconds(write_together)),
    }


def _inverse(p: int, q: int, r_G: int, r_A: int, count: int) -> FactoredInverse:
    A, G = (
        Spectrum(torch.linalg.qr(torch.randn(count, d, r)).Q, torch.rand(count, r), torch.rand(count))
        for d, r in ((q, r_A), (p, r_G))
    )
    return FactoredInverse.of(A, G, torch.full((count,), 0.1), torch.full((count,), 0.1), steady=True)


def batched() -> dict[str, tuple[float, float]]:
    """Returns, of the GPT's shapes, four blocks one after another, and stacked."""
    found = {}
    for p, q, r_G, r_A in GPT:
        single = [_inverse(p, q, r_G, r_A, 1) for _ in range(LAYERS)]
        together = _inverse(p, q, r_G, r_A, LAYERS)
        gradients = [torch.randn(1, p, q) for _ in range(LAYERS)]

        def apart(single: Sequence[FactoredInverse] = single, gradients: Sequence[Tensor] = gradients) -> None:
            for inverse, V in zip(single, gradients, strict=True):
                inverse.solve(V)

        def stacked(together: FactoredInverse = together, gradients: Sequence[Tensor] = gradients) -> None:
            together.solve(torch.cat(list(gradients)))[0].split(1)

        found[f"{LAYERS} blocks of {p} x {q}, {r_G} and {r_A} pairs"] = (milliseconds(apart), milliseconds(stacked))
    return found


def joined() -> dict[str, tuple[float, float]]:
    """Returns both sides of some blocks one after the other, and with the products onto the result joined.

    X = V + L_G P (I + U_A L_A^T) + Q L_A^T = V + [L_G, Q] [P + P U_A L_A^T; L_A^T], with P = U_G^T V and Q = V U_A.
    """
    found = {}
    for p, q, r_G, r_A in DEEP:
        inverse, V = _inverse(p, q, r_G, r_A, 1), torch.randn(1, p, q)
        L_A, U_A, L_G, U_G = inverse.A.left, inverse.A.right, inverse.G.left, inverse.G.right
        assert U_A is not None and U_G is not None, "so few pairs are no matrix"
        left, right = torch.empty(1, p, r_G + r_A), torch.empty(1, r_G + r_A, q)
        left[..., :r_G], right[:, r_G:] = L_G, L_A.mT

        def one_after_another(inverse: FactoredInverse = inverse, V: Tensor = V) -> None:
            inverse.solve(V)

        def together(
            V: Tensor = V,
            left: Tensor = left,
            right: Tensor = right,
            bases: tuple[Tensor, Tensor, Tensor] = (U_G, U_A, L_A),
        ) -> None:
            U_G, U_A, L_A = bases
            P, r_G = U_G.mT @ V, U_G.shape[-1]
            left[..., r_G:] = V @ U_A
            right[:, :r_G] = torch.baddbmm(P, P @ U_A, L_A.mT)
            torch.baddbmm(V, left, right)

        found[f"{p} x {q}, {r_G} and {r_A} pairs"] = (milliseconds(one_after_another), milliseconds(together))
    return found


def with_bias() -> dict[str, tuple[float, float]]:
    """Returns blocks with a bias, whose gradients of weight and bias go their ways apart, and joined as one matrix."""
    found = {}
    for p, q, r_G, r_A in WITH_BIAS:
        inverse, weight, bias = _inverse(p, q, r_G, r_A, 1), torch.randn(p, q - 1), torch.randn(p)

        def apart(inverse: FactoredInverse = inverse, weight: Tensor = weight, bias: Tensor = bias) -> None:
            X, x, _ = inverse.solve_apart(weight.unsqueeze(0), bias.view(1, -1, 1))
            (torch.dot(X.view(-1), weight.view(-1)) + torch.dot(x.view(-1), bias)).view(1)
            torch.mul(X[0], HALF, out=torch.empty_like(weight))
            torch.mul(x.view(-1), HALF, out=torch.empty_like(bias))

        def joined(inverse: FactoredInverse = inverse, weight: Tensor = weight, bias: Tensor = bias) -> None:
            V = torch.cat([weight.unsqueeze(0), bias.view(1, -1, 1)], -1)
            X, _ = inverse.solve(V)
            torch.dot(X.view(-1), V.view(-1)).view(1)
            torch.mul(X[0, :, :-1], HALF, out=torch.empty_like(weight))
            torch.mul(X[0, :, -1], HALF, out=torch.empty_like(bias))

        found[f"{p} x {q} with bias, {r_G} and {r_A} pairs"] = (milliseconds(apart), milliseconds(joined))
    return found


def by_rows() -> dict[str, tuple[float, float]]:
    """Returns blocks whole, and some rows at a time, so that what is read again is still in the core's own cache."""
    found = {}
    for p, q, r_G, r_A in DEEP:
        inverse, V = _inverse(p, q, r_G, r_A, 1), torch.randn(1, p, q)
        L_A, U_A, L_G, U_G = inverse.A.left, inverse.A.right, inverse.G.left, inverse.G.right
        assert U_A is not None and U_G is not None, "so few pairs are no matrix"

        def whole(inverse: FactoredInverse = inverse, V: Tensor = V) -> None:
            X, _ = inverse.solve(V)
            torch.dot(X.view(-1), V.view(-1))

        def by_rows(V: Tensor = V, bases: tuple[Tensor, Tensor, Tensor, Tensor] = (U_G, L_G, U_A, L_A)) -> None:
            U_G, L_G, U_A, L_A = bases
            P, X = torch.bmm(U_G.mT, V), torch.empty_like(V)
            for first in range(0, V.shape[1], ROWS):
                rows = slice(first, first + ROWS)
                x, v = X[:, rows], V[:, rows]
                torch.baddbmm(v, L_G[:, rows], P, out=x)
                x.baddbmm_(torch.bmm(x, U_A), L_A.mT)
                torch.dot(x.view(-1), v.view(-1))

        found[f"{p} x {q}, {r_G} and {r_A} pairs, rows"] = (milliseconds(whole), milliseconds(by_rows))
    return found


def main() -> None:
    """Prints a table."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{'ms':50}{'in use':>10}{'other':>10}")
    for name, (used, other) in {
        **clip_and_write(),
        **batched(),
        **joined(),
        **with_bias(),
        **by_rows(),
    }.items():
        print(f"{name:50}{used:10.3f}{other:10.3f}")


if __name__ == "__main__":
    main()
