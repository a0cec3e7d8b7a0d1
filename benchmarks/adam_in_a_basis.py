"""Trains by Adam in an eigenbasis, in variants, in plain PyTorch: what `ekfac-adam` was chosen by.

    PYTHONPATH=. python -m benchmarks.adam_in_a_basis [--task TASK] [--steps STEPS] [--seeds SEEDS] [--json FILE]

Every linear layer and convolution has factors A and G in one process, decomposed inline; everything else is AdamW's.
Printed are the steps to each of a task's goals, held three measurements in a row, and the last value. They depend on
the seed and on the last bits of the libraries, not on the machine's load. docs/decisions/0028 has the findings.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.bench.contest_tasks import TASKS
from kfdist.bench.target_cells import IN_A_ROW
from kfdist.bench.to_target import held
from kfdist.system.provenance import versions

GOALS = {"autoencoder": (0.0126, 0.0054, 0.0030, 0.0022), "cnn": (0.05, 0.04, 0.035, 0.03), "gpt": (2.0, 1.8, 1.6, 1.5)}
RATES = {"autoencoder": 0.005, "cnn": 0.01, "gpt": 0.01}
STEPS = {"autoencoder": 800, "cnn": 150, "gpt": 250}
MOST_OF_THE_PAST = 0.8


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How Adam is kept in a basis; the defaults are those of `ekfac-adam`.

    Attributes:
        statistics: Whose eigenvectors: of the factors over examples, or of G G^T and G^T G of the mean gradient.
        factor_period: Steps between two foldings.
        period: Steps between two decompositions, a multiple of it.
        first: Where the first moment is kept: in the basis, or as momentum of the direction.
        second: What becomes of the second at a swap: it stays but is raised to the first's square where that is more,
            just stays, is turned by squared overlaps, or begins anew.
        nesterov: Whether momentum is Nesterov's.
        widest: The largest dimension that has a basis.
        betas: Decays of the moments.
        eps: Added to the root of the second.
    """

    statistics: Literal["examples", "gradients"] = "examples"
    factor_period: int = 5
    period: int = 5
    first: Literal["basis", "direction"] = "basis"
    second: Literal["raised", "stays", "turned", "anew"] = "raised"
    nesterov: bool = True
    widest: int = 4096
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


VARIANTS = {
    "as decided": Variant(),
    "statistics of gradients": Variant(statistics="gradients"),
    "period 20": Variant(period=20),
    "period 100": Variant(period=100),
    "without Nesterov's momentum": Variant(nesterov=False),
    "momentum of the direction": Variant(first="direction"),
    "second moment as it is": Variant(second="stays"),
    "second moment turned": Variant(second="turned"),
    "second moment anew": Variant(second="anew"),
    "no basis above 200": Variant(widest=200),
    "betas .95, .95": Variant(betas=(0.95, 0.95)),
    "betas .9, .99": Variant(betas=(0.9, 0.99)),
}


@dataclass(eq=False)
class Layer:
    """A layer's factors, basis and moments.

    Attributes:
        module: The layer, an `nn.Linear` or `nn.Conv2d`.
        inputs: Of the last forward that was measured.
        outputs: Likewise; their gradients become G.
        factors: A and G, averaged.
        basis: U_A and U_G; None where a dimension is too wide.
        moments: First and second, with the weights that correct their bias.
    """

    module: Any
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    basis: tuple[Tensor | None, Tensor | None] = (None, None)
    moments: list[Tensor] = field(default_factory=list)

    def gradient(self) -> Tensor:
        """Returns V, the bias last."""
        weight, bias = self.module.weight.grad.flatten(1), self.module.bias
        return weight if bias is None else torch.cat([weight, bias.grad[:, None]], 1)

    def rows(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Returns inputs and output gradients as rows `[n, t, d]`, the homogeneous coordinate last."""
        a = self.inputs
        assert a is not None
        if isinstance(self.module, nn.Conv2d):
            shape: Any = self.module.kernel_size, self.module.dilation, self.module.padding, self.module.stride
            a, g = F.unfold(a, *shape).mT, g.flatten(2).mT
        a, g = (each.reshape(len(each), -1, each.shape[-1]) for each in (a, g))
        return (a if self.module.bias is None else F.pad(a, (0, 1), value=1.0)), g

    def fold(self, A: Tensor, G: Tensor) -> None:
        """Averages factors."""
        if self.factors is None:
            self.factors = A, G
            return
        for kept, new in zip(self.factors, (A, G), strict=True):
            kept.lerp_(new, 1 - MOST_OF_THE_PAST)

    def decompose(self, variant: Variant) -> None:
        """Takes the factors' eigenvectors, in the order of their eigenvalues, and turns the moments into them."""
        assert self.factors is not None, "a factor is folded at the first step"
        before = self.basis
        A, G = (torch.linalg.eigh(M).eigenvectors.flip(-1) if len(M) <= variant.widest else None for M in self.factors)
        self.basis = A, G
        if not self.moments:
            return
        if variant.first == "basis":
            self.moments[0] = self.into(_both(self.moments[0], before, back=True))
        if variant.second == "raised" and variant.first == "basis":
            m, v, m_weight, v_weight = self.moments
            self.moments[1] = torch.maximum(v, (m / m_weight).square() * v_weight)
        elif variant.second == "turned":
            A, G = (
                None if new is None or old is None else (new.mT @ old).square()
                for new, old in zip(self.basis, before, strict=True)
            )
            self.moments[1] = _both(self.moments[1], (A, G), back=True)
        elif variant.second == "anew":
            self.moments[1], self.moments[3] = (torch.zeros_like(self.moments[place]) for place in (1, 3))

    def into(self, matrix: Tensor) -> Tensor:
        """Returns U_G^T X U_A."""
        return _both(matrix, self.basis, back=False)

    def direction(self, variant: Variant) -> Tensor:
        """Advances the moments by the gradient and returns what to step along."""
        R, (beta1, beta2) = self.into(self.gradient()), variant.betas
        if not self.moments:
            self.moments = [torch.zeros_like(R), torch.zeros_like(R), torch.zeros(()), torch.zeros(())]
        m, v, m_weight, v_weight = self.moments
        v.lerp_(R.square(), 1 - beta2)
        v_weight.lerp_(torch.ones(()), 1 - beta2)
        root = (v / v_weight).sqrt() + variant.eps
        new = R if variant.first == "basis" else _both(R / root, self.basis, back=True)
        m.lerp_(new, 1 - beta1)
        m_weight.lerp_(torch.ones(()), 1 - beta1)
        average = m / m_weight
        if variant.nesterov:
            average = torch.lerp(m, new, 1 - beta1) / torch.lerp(m_weight, torch.ones(()), 1 - beta1)
        return _both(average / root, self.basis, back=True) if variant.first == "basis" else average

    def move(self, direction: Tensor, lr: float) -> None:
        """Steps the layer."""
        if self.module.bias is not None:
            self.module.bias.sub_(direction[:, -1], alpha=lr)
            direction = direction[:, :-1]
        self.module.weight.sub_(direction.reshape(self.module.weight.shape), alpha=lr)


def _both(matrix: Tensor, basis: tuple[Tensor | None, Tensor | None], *, back: bool) -> Tensor:
    """Returns U_G^T X U_A, or U_G X U_A^T on the way back; a side without a basis stays."""
    A, G = basis
    if G is not None:
        matrix = (G if back else G.mT) @ matrix
    return matrix if A is None else matrix @ (A.mT if back else A)


class AdamInABasis:
    """Trains a model; `measure` precedes the backward, `step` follows it."""

    def __init__(self, model: nn.Module, variant: Variant, lr: float) -> None:
        self.variant, self.lr, self.steps = variant, lr, 0
        self.layers = [Layer(each) for each in model.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        for layer in self.layers:
            layer.module.register_forward_hook(self._seen(layer))
        own = {p for layer in self.layers for p in layer.module.parameters()}
        rest = [p for p in model.parameters() if p not in own]
        self.rest = torch.optim.AdamW(rest, lr=lr, weight_decay=0.0) if rest else None

    def _seen(self, layer: Layer) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            del module
            if self._measures and torch.is_grad_enabled():
                layer.inputs, layer.outputs = inputs[0].detach(), outputs

        return hook

    @property
    def _measures(self) -> bool:
        return self.variant.statistics == "examples" and self.steps % self.variant.factor_period == 0

    def measure(self, loss: Tensor, examples: int) -> None:
        """Folds the empirical Fisher's factors of a batch, where they are due."""
        if not self._measures:
            return
        outputs = [each.outputs for each in self.layers if each.outputs is not None]
        gradients = torch.autograd.grad(loss * examples, outputs, retain_graph=True)
        for layer, gradient in zip(self.layers, gradients, strict=True):
            a, g = layer.rows(gradient)
            positions, a, g = a.shape[1], a.flatten(0, 1), g.flatten(0, 1)
            layer.fold(a.mT @ a / examples, g.mT @ g / (examples * positions))

    @torch.no_grad()
    def step(self) -> None:
        """Steps all parameters along the gradients."""
        for layer in self.layers:
            if self.variant.statistics == "gradients" and self.steps % self.variant.factor_period == 0:
                V = layer.gradient()
                layer.fold(V.mT @ V, V @ V.mT)
            if self.steps % self.variant.period == 0:
                layer.decompose(self.variant)
            layer.move(layer.direction(self.variant), self.lr)
        if self.rest is not None:
            self.rest.step()
        self.steps += 1


WORK = {"autoencoder": TASKS["digits-autoencoder"], "cnn": TASKS["digits-cnn"], "gpt": TASKS["character-gpt"]}


def train(name: str, variant: Variant, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """Trains a task by a variant.

    Returns:
        "steps" to each goal, None where it isn't held within `steps`, and the "last" value.
    """
    task = WORK[name]
    model, batches, curve = task.model(seed), task.batches(seed), []
    optimizer = AdamInABasis(model, variant, lr)
    for step in range(1, steps + 1):
        inputs, targets = next(batches)
        model.zero_grad()
        loss = task.loss(model(inputs), targets)
        optimizer.measure(loss, len(inputs))
        loss.backward()
        optimizer.step()
        if step % task.evaluation_period == 0:
            curve.append((0.0, step, task.value(model)))
    reached = [
        next((curve[end - IN_A_ROW][1] for end in range(IN_A_ROW, len(curve) + 1) if held(curve[:end], goal)), None)
        for goal in GOALS[name]
    ]
    return {"goals": GOALS[name], "steps": reached, "last": round(curve[-1][2], 5)}


def main() -> None:
    """Reads the arguments and trains every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=WORK, default="autoencoder")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    steps, lr = given.steps or STEPS[given.task], RATES[given.task]
    found: list[dict[str, Any]] = []
    print(f"{WORK[given.task].title}; rate {lr:g}, {steps} steps; {WORK[given.task].metric} {GOALS[given.task]}")
    for variant, seed in product(VARIANTS, range(given.seeds)):
        done = train(given.task, VARIANTS[variant], lr, steps, seed)
        print(f"{variant:28} seed {seed}  {done['steps']}  last {done['last']}", flush=True)
        found.append({"task": given.task, "variant": variant, "lr": lr, "seed": seed, **done})
        if given.json is not None:
            content = {"trainings": found, "variants": {name: asdict(each) for name, each in VARIANTS.items()}}
            given.json.write_text(json.dumps({**content, "versions": versions()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
