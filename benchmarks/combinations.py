"""Every combination of options that a method has to go with: right, or refused with a sentence.

    python -m benchmarks.combinations           writes the table into docs/coverage.md
    python -m benchmarks.combinations --check   says whether it is current

Each combination preconditions one gradient of a tiny float64 model and is compared with the dense truth, written out
here from the rows of each example. The model's logits are zero, one for each example, so that the second moments of
"mc", "exact" and "empirical" are the same numbers whatever is drawn: u u^T is 1/4. Where a share of the examples
(positions) is measured, all examples (positions) are alike but for their sign: the second moments of any of them are
those of all, the gradient of some isn't that of all.
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kfdist
from kfdist.curvature.gradient_inverter import AbstractGradientInverter
from kfdist.curvature.inverters import INVERTERS, make_inverter
from kfdist.curvature.references import damping_shares
from kfdist.errors import KfdistError
from kfdist.types import Fisher, WeightSharing

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
BEGIN, END = "<!-- combinations -->", "<!-- end of combinations -->"

TOLERANCE = 1e-8
"""Relative to the largest entry. float64; CG and eigenvectors of factors with null spaces lose the most digits."""

N, T, DAMPING = 4, 3, 0.3
LARGE_RANK = 64

SAMPLINGS: Mapping[str, Mapping[str, Any]] = {
    "all": {},
    "examples_fraction": {"examples_fraction": 0.5},
    "positions_fraction": {"positions_fraction": 0.4},
    "positions_budget": {"positions_budget": 2},
}
BRAND = {"rank": N * T, "increment_rows": N * T}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "kfac": ("kfac", {}),
    "kfac-eigen": ("kfac-eigen", {}),
    "kfac-tridiagonal": ("kfac-tridiagonal", {"assume_chain": True}),
    "ekfac": ("ekfac", {}),
    "ekfac-adam": ("ekfac-adam", {}),
    "rs-kfac": ("rs-kfac", {"rank": LARGE_RANK}),
    "sre-kfac": ("sre-kfac", {"rank": LARGE_RANK}),
    "b-kfac": ("b-kfac", BRAND),
    'b-kfac, apply_to "rows"': ("b-kfac", {**BRAND, "apply_to": "rows"}),
    "b-r-kfac": ("b-r-kfac", BRAND),
    'b-r-kfac, apply_to "rows"': ("b-r-kfac", {**BRAND, "apply_to": "rows"}),
    "b-kfac-c": ("b-kfac-c", BRAND),
    'b-kfac-c, apply_to "rows"': ("b-kfac-c", {**BRAND, "apply_to": "rows"}),
    'cg-fac, operator "kronecker"': ("cg-fac", {"operator": "kronecker", "tolerance": 1e-13, "max_iterations": 500}),
    'cg-fac, operator "block"': ("cg-fac", {"operator": "block", "tolerance": 1e-13, "max_iterations": 500}),
    "seng": ("seng", {"columns": None}),
    'seng, form "implicit"': ("seng", {"columns": None, "form": "implicit"}),
    "eva": ("eva", {}),
    "two-level": ("two-level", {}),
}
"""Every method, with the settings that change what is measured or where the inverse is applied; as exact as can be."""

assert {method for method, _ in VARIANTS.values()} == {
    name for name, cls in INVERTERS.items() if not issubclass(cls, AbstractGradientInverter)
}, "a method is missing"


class Pooled(nn.Module):
    """Two layers at every position, pooled to one logit of zero for each example, with its gradient."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        generator = torch.Generator(device="cpu").manual_seed(0)
        self.first, self.second = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, 3, bias=False)
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Returns logits `[N]`."""
        outputs = self.second(torch.tanh(self.first(x))).mean(1)
        logits = outputs @ torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64, device="cpu")
        return logits - logits.detach()


@dataclass(frozen=True)
class Case:
    """One combination."""

    variant: str
    fisher: Fisher
    sharing: WeightSharing
    sampling: str

    @property
    def method(self) -> str:
        """The method's name."""
        return VARIANTS[self.variant][0]

    def model(self) -> Pooled:
        """Brand's updates need factors that are larger than their rows; the last layer's is never."""
        return Pooled(26, 25) if self.method.startswith("b-") else Pooled(5, 4)

    def batch(self, width: int) -> tuple[Tensor, Tensor]:
        """Returns inputs and labels; see the module's docstring. Mean vectors have no signs to lose."""
        generator = torch.Generator(device="cpu").manual_seed(1)
        x = torch.randn(N, T, width, generator=generator, dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64, device="cpu")
        labels = torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64, device="cpu")
        if self.method == "eva":
            signs, labels = torch.ones_like(signs), torch.ones_like(labels)
        if self.sampling == "examples_fraction":
            x = x[:1] * signs[:, None, None]
        elif self.sampling != "all":
            x = x[:, :1] * signs[None, :T, None]
        return x, labels


def walk() -> Iterator[Case]:
    """Goes through the whole product."""
    for values in itertools.product(VARIANTS, get_args(Fisher), get_args(WeightSharing), SAMPLINGS):
        yield Case(*values)


def outcome(case: Case) -> str:
    """Returns the sentence that refuses a combination, or nothing where its direction is the truth's.

    Raises:
        AssertionError: It is neither.
    """
    model = case.model()
    x, labels = case.batch(model.first.in_features)
    method, settings = VARIANTS[case.variant]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", kfdist.errors.KfdistWarning)
            found = _directions(case, model, make_inverter(method, **settings), x, labels)
    except KfdistError as refusal:
        return str(refusal)
    for name, expected in truth(case, model, x, labels).items():
        error = float((found[name] - expected).abs().max() / expected.abs().max())
        assert error <= TOLERANCE, f"{case}: the direction of {name!r} is {error:.2g} off"
    return ""


def _directions(case: Case, model: Pooled, inverter: Any, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    with kfdist.Preconditioner(
        model,
        inverter,
        damping=DAMPING,
        factor_period=1,
        inverse_period=1,
        fisher=case.fisher,
        weight_sharing=case.sharing,
        sampling=kfdist.Sampling(**SAMPLINGS[case.sampling]),
        kl_clip=None,
        adoption=kfdist.FixedLag(0),
    ) as preconditioner:
        logits = model(x)
        preconditioner.observe(logits, "binary_cross_entropy")
        F.binary_cross_entropy_with_logits(logits, labels).backward()
        preconditioner.step()
    return _gradients(model)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, layer in model.named_children():
        gradient = layer.weight.grad
        assert isinstance(gradient, Tensor)
        found[name] = gradient.clone()
    return found


# The dense truth ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """What a layer saw: a `[N, T, q]`, g `[N, T, p]` of the per-example loss, and its gradient V."""

    a: Tensor
    g: Tensor
    V: Tensor

    def shared(self, sharing: WeightSharing) -> tuple[Tensor, Tensor]:
        """Returns the rows that the factors are of (algorithms.md 7.9)."""
        return (self.a, self.g) if sharing == "expand" else (self.a.mean(1, keepdim=True), self.g.sum(1, keepdim=True))


def truth(case: Case, model: Pooled, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Returns (F + lambda I)^-1 V of each layer as the method approximates F."""
    first = model.first(x)
    hidden = torch.tanh(first)
    outputs = model.second(hidden)
    logits = outputs.mean(1) @ torch.tensor([1.0, -0.5, 0.7], dtype=torch.float64, device="cpu")
    logits = logits - logits.detach()
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    model.zero_grad()
    (losses / N).backward(retain_graph=True, inputs=list(model.parameters()))
    g = torch.autograd.grad(losses, [first, outputs])
    gradients = _gradients(model)
    rows = {
        name: Rows(a.detach(), of_outputs, gradients[name])
        for name, a, of_outputs in zip(("first", "second"), (x, hidden), g, strict=True)
    }
    if case.method in COUPLED:
        return COUPLED[case.method](rows, case.sharing)
    solve = VARIANT_TRUTHS[case.variant] if case.variant in VARIANT_TRUTHS else SINGLE[case.method]
    return {name: solve(each, case.sharing) for name, each in rows.items()}


def moments(i: tuple[Tensor, Tensor], j: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns Omega and Gamma of two layers' rows."""
    A, G = (torch.einsum("nti,ntj->ij", mine, others) for mine, others in zip(i, j, strict=True))
    return A / N, G / (N * i[1].shape[1])


def dense(F_: Tensor, V: Tensor) -> Tensor:
    """Solves (F + lambda I) u = vec(V)."""
    identity = torch.eye(V.numel(), dtype=torch.float64, device="cpu")
    return torch.linalg.solve(F_ + DAMPING * identity, V.flatten()).view_as(V)


def joint(rows: Rows, sharing: WeightSharing) -> Tensor:
    A, G = moments(rows.shared(sharing), rows.shared(sharing))
    return dense(torch.kron(G, A), rows.V)


def damped(rows: Rows, sharing: WeightSharing) -> tuple[Tensor, Tensor]:
    """Returns both factors, damped by the rule "pi"."""
    A, G = moments(rows.shared(sharing), rows.shared(sharing))
    shares = damping_shares(A[None], G[None], rule="pi", damping=DAMPING)
    first, second = (
        M + share * torch.eye(len(M), dtype=torch.float64, device="cpu")
        for M, share in zip((A, G), shares, strict=True)
    )
    return first, second


def factored(rows: Rows, sharing: WeightSharing) -> Tensor:
    A, G = damped(rows, sharing)
    return torch.linalg.solve(G, torch.linalg.solve(A, rows.V.T).T)


def example_gradients(rows: Rows) -> Tensor:
    return torch.einsum("ntp,ntq->npq", rows.g, rows.a)


def block(rows: Rows, _sharing: WeightSharing) -> Tensor:
    vectors = example_gradients(rows).flatten(1)
    return dense(vectors.T @ vectors / N, rows.V)


def rescaled(rows: Rows, sharing: WeightSharing) -> Tensor:
    A, G = moments(rows.shared(sharing), rows.shared(sharing))
    (_, Q_A), (_, Q_G) = torch.linalg.eigh(A), torch.linalg.eigh(G)
    scales = (Q_G.T @ example_gradients(rows) @ Q_A).square().mean(0)
    return Q_G @ ((Q_G.T @ rows.V @ Q_A) / (scales + DAMPING)) @ Q_A.T


def mean_vectors(rows: Rows, sharing: WeightSharing) -> Tensor:
    a, g = rows.shared(sharing)
    mean_a, mean_g = a.mean((0, 1)) * a.shape[1] ** 0.5, g.mean((0, 1))
    return dense(torch.kron(torch.outer(mean_g, mean_g), torch.outer(mean_a, mean_a)), rows.V)


def two_level(rows: Mapping[str, Rows], sharing: WeightSharing) -> dict[str, Tensor]:
    """B^-1 V + R^T [(D + off-diagonal part of F_c)^-1 - D^-1] R V, D = R B R^T, B = A (x) G + lambda I."""
    layers = list(rows.values())
    pairs = [[moments(i.shared(sharing), j.shared(sharing)) for j in layers] for i in layers]
    coarse = torch.stack([torch.stack([A.sum() * G.sum() for A, G in of_layer]) for of_layer in pairs])
    entries = torch.tensor([float(each.V.numel()) for each in layers], dtype=torch.float64, device="cpu")
    D = torch.diag(coarse.diagonal() + DAMPING * entries)
    sums = torch.stack([each.V.sum() for each in layers])
    off = coarse - torch.diag(coarse.diagonal())
    correction = torch.linalg.solve(D + off, sums) - torch.linalg.solve(D, sums)
    return {name: joint(each, sharing) + correction[place] for place, (name, each) in enumerate(rows.items())}


def tridiagonal(rows: Mapping[str, Rows], sharing: WeightSharing) -> dict[str, Tensor]:
    """Xi^T diag(Sigma^-1) Xi vec(V), written out (algorithms.md 1.3)."""
    first, second = rows.values()
    (A, G), (A2, G2) = damped(first, sharing), damped(second, sharing)
    A12, G12 = moments(first.shared(sharing), second.shared(sharing))
    Psi_A, Psi_G = A12 @ torch.linalg.inv(A2), G12 @ torch.linalg.inv(G2)
    Psi = torch.kron(Psi_G, Psi_A)
    Sigma = torch.kron(G, A) - torch.kron(Psi_G @ G2 @ Psi_G.T, Psi_A @ A2 @ Psi_A.T)
    inner = torch.linalg.solve(Sigma, first.V.flatten() - Psi @ second.V.flatten())
    last = torch.linalg.solve(torch.kron(G2, A2), second.V.flatten()) - Psi.T @ inner
    return {"first": inner.view_as(first.V), "second": last.view_as(second.V)}


def adams_first(rows: Rows, sharing: WeightSharing) -> Tensor:
    """Returns Adam's first step in the eigenvectors of both factors, Q_G sign(Q_G^T V Q_A) Q_A^T."""
    A, G = moments(rows.shared(sharing), rows.shared(sharing))
    Q_A, Q_G = torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(G).eigenvectors
    R = Q_G.T @ rows.V @ Q_A
    return Q_G @ (R / (R.abs() + 1e-8)) @ Q_A.T


SINGLE: Mapping[str, Callable[[Rows, WeightSharing], Tensor]] = {
    **dict.fromkeys(("kfac", "rs-kfac", "sre-kfac", "b-kfac", "b-r-kfac", "b-kfac-c"), factored),
    "kfac-eigen": joint,
    "ekfac": rescaled,
    "ekfac-adam": adams_first,
    "seng": block,
    "eva": mean_vectors,
}
VARIANT_TRUTHS = {'cg-fac, operator "kronecker"': joint, 'cg-fac, operator "block"': block}
COUPLED = {"two-level": two_level, "kfac-tridiagonal": tridiagonal}


# The table ------------------------------------------------------------------------------------------------------------


def table(outcomes: Mapping[Case, str]) -> str:
    """Returns the section of the page."""
    columns = list(itertools.product(get_args(WeightSharing), get_args(Fisher)))
    outcomes = {case: _anonymous(case, reason) for case, reason in outcomes.items()}
    reasons = list(dict.fromkeys(reason for reason in outcomes.values() if reason))
    lines = [
        BEGIN,
        "## Combinations of options",
        "",
        "What `python -m benchmarks.combinations` finds for each method with each `weight_sharing`, `fisher` and",
        f"sampling ({', '.join(SAMPLINGS)}): {len(outcomes)} combinations, each on a tiny float64 model.",
        "*right*: with each sampling the direction is that of the dense formula. A number: refused, with that sentence",
        "(at construction, but for what depends on the shape of the data).",
        "",
        "| method | " + " | ".join(f"{sharing}, {fisher}" for sharing, fisher in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for variant in VARIANTS:
        cells = [_cell({s: outcomes[Case(variant, f, w, s)] for s in SAMPLINGS}, reasons) for w, f in columns]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), "", END]
    return "\n".join(lines)


def _anonymous(case: Case, reason: str) -> str:
    """Returns a sentence without the names of the method and of the tiny model's layers."""
    for name in ("first", "second"):
        reason = reason.replace(f"'{name}'", "LAYER")
    return reason if case.method == "kfac-tridiagonal" else reason.replace(f"{case.method} ", "METHOD ")


def _cell(of_sampling: Mapping[str, str], reasons: Sequence[str]) -> str:
    said = {name: reasons.index(reason) + 1 if reason else 0 for name, reason in of_sampling.items()}
    usual = said["all"]
    others = [f"{number} with {name}" for name, number in said.items() if number != usual]
    return "; ".join([str(usual or "right"), *others])


def written(page: str, section: str) -> str:
    """Returns a page with its section on combinations replaced, or added at the end."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{section}\n".lstrip("\n")
    before, rest = page.split(BEGIN, 1)
    return before + section + rest.split(END, 1)[1]


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page isn't current")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# What is preconditioned, and how it goes together\n"
    new = written(page, table({case: outcome(case) for case in walk()}))
    if check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
