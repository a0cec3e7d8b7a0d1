"""`kfdist.AdaptiveStep`: the self-tuning step of the original K-FAC paper (algorithms.md 1.2)."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.comm.reduce import reduce_flat
from kfdist.errors import CheckpointError, Interrupted, LossNotFinite
from kfdist.optim.adaptive_settings import AdaptiveReport, AdaptiveSettings, Trust
from kfdist.optim.output_fisher import Differentiation, NoForwardDerivative, OutputFisher, OutputProduct
from kfdist.optim.quadratic_model import InnerProducts, ModelStep, inner_product, minimise_model
from kfdist.optim.replay import Closure, Replay
from kfdist.optim.requirements import FIXED, check_arguments
from kfdist.runtime.preconditioner import Preconditioner

_LOG = logging.getLogger(__name__)

_ROUNDING = 8.0
"""Accuracy of inner products, in units in the last place of the parameters' dtype."""


@dataclass(frozen=True)
class _Batch:
    """The step's batch: this rank's share of all terms, and the mean loss over all ranks before the step."""

    share: float
    loss: float


@dataclass(frozen=True)
class _Candidate:
    """The direction for one gamma, and the best step in the span of it and the last step."""

    gamma: float
    direction: list[Tensor]
    model: ModelStep


@dataclass(frozen=True)
class _Outcome:
    """What became of a step."""

    new_loss: float | None
    rho: float | None
    accepted: bool


class AdaptiveStep:
    r"""Replaces the optimizer: moves the parameters by d = alpha Delta + mu d_last, the minimiser of a quadratic model.

    Delta = -(F + gamma^2 I)^-1 grad h comes from the preconditioner. alpha and mu minimise
    M(d) = 1/2 d^T (F + (lambda + eta) I) d + grad h^T d + h with the exact Fisher F of the whole network on this batch.
    lambda follows the reduction ratio rho by Levenberg and Marquardt's rule, gamma is searched for, and a step that
    raises the objective h(theta) = loss + eta/2 |theta|^2 on the same batch is undone and raises lambda.
    Source: Martens and Grosse (1503.05671), algorithms.md 1.2. It suits full or large batches of smooth problems,
    autoencoders above all; for strongly varying mini-batches, fixed damping with a KL clip is the better choice.

    rho is formed with lambda left out of M, so that it is 1 if h is quadratic. After a rejected step the parameters'
    last change is zero: the next step starts without momentum. Parameters without a block take -grad h/(lambda + eta)
    as their part of Delta.

    All ranks must construct it and call `step` equally often; they decide alike, because decisions depend on
    all-reduced numbers alone. It reduces the gradients itself: don't wrap the model in DDP. A rank's loss counts by the
    number of terms that it averages.

    Args:
        preconditioner: Made with kl_clip=None and adoption=FixedLag(0), by methods that are damped at apply, such as
            `KfacEigen(damping_rule="pi")`, the paper's factored Tikhonov damping. Its `damping` has no effect.
        loss: "mse", "cross_entropy" or "binary_cross_entropy" (on logits): the distribution that the preconditioner's
            "mc" and "exact" Fisher assume, with mean reduction; None if the closure calls `preconditioner.observe`
            itself (with a target, say). The F of the quadratic model always follows from the closure's loss.
        weight_decay: eta, the l2 coefficient; part of the gradient and of the model.
        damping: The first lambda.
        settings: Periods, factors, bounds and switches; the paper's if None.

    Raises:
        ConfigError: A value is out of range, or the preconditioner doesn't fit.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        loss: str | None = "mse",
        weight_decay: float = 0.0,
        damping: float = 150.0,
        *,
        settings: AdaptiveSettings | None = None,
    ) -> None:
        self._settings = settings or AdaptiveSettings()
        check_arguments(preconditioner, loss, weight_decay, damping)
        self._preconditioner = preconditioner
        preconditioner.pipeline.in_force.fixed |= dict.fromkeys(FIXED, "AdaptiveStep, which trains the model, sets it")
        self._loss = loss if preconditioner.settings.fisher != "empirical" else None
        self._eta = float(weight_decay)
        self._trust = Trust(self._settings, float(damping), self._eta)
        # Inverses have the eigenpairs that the smallest gamma of a step will need.
        preconditioner.pipeline.in_force.stand_in = lambda: min(self._trust.candidates(self._count + 1)) ** 2
        named = [(name, p) for name, p in preconditioner.model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._accuracy = _ROUNDING * max(torch.finfo(p.dtype).eps for p in self._parameters)
        wanted = self._settings.differentiation
        self._how = Differentiation.FORWARD if wanted == "auto" else Differentiation(wanted)
        self._last: list[Tensor] | None = None
        self._count = 0

    def step(self, closure: Closure) -> AdaptiveReport:
        """Makes one step of training. Collective: all ranks must call it.

        Args:
            closure: Runs the model on this step's batch and returns (output, loss) without a backward, or (output,
                loss, examples) if the loss averages `examples` terms (unmasked tokens, say) rather than dim 0 of the
                output. `output` is the tensor that the loss was computed from; the loss must depend on the model
                through it alone. It is called up to seven times and must use the same data each time; BatchNorm's
                buffers and torch's generators are put back in between, so that dropout draws the same masks.

        Returns:
            What was done. Afterwards `.grad` holds the gradient of the objective.

        Raises:
            LossNotFinite: The loss is infinite or NaN before the step, on some rank; nothing was changed.
            KfdistError: The closure returned something else than it must.
            Interrupted: By the preconditioner; the step was not made, and buffers and generators are as before it.
        """
        replay = Replay(closure, self._preconditioner.model, self._parameters[0].device)
        batch = self._measure(replay)
        try:
            done = self._preconditioner.update()
        except Interrupted:  # the step will be made again, perhaps from a checkpoint written now
            replay.undo()
            raise
        damping = self._trust.damping
        chosen = self._choose(replay, batch)
        outcome = self._move(replay, batch, chosen)
        coefficients = (*chosen.model.coefficients, 0.0) if chosen is not None else (0.0, 0.0)
        report = AdaptiveReport(
            step=self._count,
            loss=batch.loss,
            new_loss=outcome.new_loss,
            rho=outcome.rho,
            alpha=coefficients[0],
            momentum=coefficients[1],
            damping=damping,
            gamma=chosen.gamma if chosen is not None else self._trust.gamma,
            model_change=chosen.model.change if chosen is not None else 0.0,
            accepted=outcome.accepted,
            preconditioner=done,
        )
        self._count += 1
        counters = self._preconditioner.pipeline.counters
        counters.adaptive_damping = damping
        if outcome.rho is not None:
            counters.trust_ratio = outcome.rho
        return report

    @property
    def damping(self) -> float:
        """The lambda at which the next step starts."""
        return self._trust.damping

    def state_dict(self) -> dict[str, Any]:
        """Returns lambda, gamma, the number of steps, and the last step by parameter name; equal on all ranks."""
        last = self._last and dict(zip(self._names, (each.clone() for each in self._last), strict=True))
        return {"steps": self._count, "damping": self._trust.damping, "gamma": self._trust.gamma, "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved state.

        Raises:
            CheckpointError: The state is of another model.
        """
        last = state["last"]
        if last is not None:
            own = {name: p.shape for name, p in zip(self._names, self._parameters, strict=True)}
            if {name: each.shape for name, each in last.items()} != own:
                raise CheckpointError(
                    "the adaptive step's state is of a model with other parameters; load the state that was saved "
                    "together with this model"
                )
            last = [
                last[name].to(p.device, p.dtype, copy=True)
                for name, p in zip(self._names, self._parameters, strict=True)
            ]
        self._last = last
        self._count = int(state["steps"])
        self._trust.damping = float(state["damping"])
        self._trust.gamma = float(state["gamma"])

    # The verbs -------------------------------------------------------------------------------------------------------

    def _measure(self, replay: Replay) -> _Batch:
        """Runs forward and backward; `.grad` becomes the gradient of the objective over all ranks' batches."""
        for parameter in self._parameters:
            parameter.grad = None
        evaluation = replay.first()
        n = float(evaluation.examples)
        loss = evaluation.loss.detach().double()
        totals = self._sum_over_ranks(torch.stack([torch.full_like(loss, n), n * loss]))
        total, mean = totals[0], totals[1] / totals[0]
        if not math.isfinite(mean):
            replay.undo()
            raise LossNotFinite(
                f"the loss is {mean} before step {self._count}, at parameters that the last step accepted: look "
                "for bad values in the batch. Nothing was changed; continue with the next batch, or stop"
            )
        if evaluation.stated:
            self._preconditioner.batch(examples=evaluation.examples)
        if self._loss is not None:
            self._preconditioner.observe(evaluation.output, loss=self._loss)
        evaluation.loss.backward()
        self._reduce_gradients(n / total)
        return _Batch(share=n / total, loss=mean)

    def _reduce_gradients(self, share: float) -> None:
        """Averages the gradients over ranks, weighted by their shares of the terms, and adds eta theta."""
        for dtype in dict.fromkeys(p.dtype for p in self._parameters):
            members = [p for p in self._parameters if p.dtype == dtype]
            own = [torch.zeros_like(p) if p.grad is None else p.grad * share for p in members]
            for parameter, gradient in zip(members, reduce_flat(own, self._preconditioner.world), strict=True):
                parameter.grad = gradient.add_(parameter.detach(), alpha=self._eta)

    def _choose(self, replay: Replay, batch: _Batch) -> _Candidate | None:
        """Tries each candidate for gamma and returns the step with the smallest M; None if none has a finite M."""
        fisher = self._fisher(replay)
        last = [self._last] if self._settings.momentum and self._last is not None else []
        along_last = [self._product(fisher, each) for each in last]
        best: _Candidate | None = None
        for gamma in self._trust.candidates(self._count + 1):
            direction = self._direction(gamma)
            basis, products = [direction, *last], [self._product(fisher, direction), *along_last]
            model = minimise_model(
                self._inner_products(basis, products, batch.share),
                damping=self._trust.damping,
                weight_decay=self._eta,
                relative_accuracy=self._accuracy,
            )
            if model is not None and (best is None or model.change < best.model.change):
                best = _Candidate(gamma, direction, model)
        return best

    def _move(self, replay: Replay, batch: _Batch, chosen: _Candidate | None) -> _Outcome:
        """Moves the parameters, measures the objective and adapts lambda; or undoes a step that made it worse."""
        if chosen is None:
            return self._refuse(None, None)
        c, last = chosen.model.coefficients, self._last
        delta = [c[0] * each for each in chosen.direction]
        if len(c) > 1 and last is not None:
            delta = [each.add_(previous, alpha=c[1]) for each, previous in zip(delta, last, strict=True)]
        judged = self._settings.rejection or self._trust.adapts(self._count + 1)
        saved = [p.detach().clone() for p in self._parameters] if self._settings.rejection else []
        before = self._penalty()
        with torch.no_grad():
            for parameter, each in zip(self._parameters, delta, strict=True):
                parameter.add_(each)
        new_loss = rho = None
        if judged:
            new_loss = self._loss_now(replay, batch)
            change = (new_loss - batch.loss) + (self._penalty() - before)
            predicted = chosen.model.undamped_change
            rho = change / predicted if predicted else math.nan
            if self._settings.rejection and not change <= 0.0:
                with torch.no_grad():
                    for parameter, values in zip(self._parameters, saved, strict=True):
                        parameter.copy_(values)
                return self._refuse(new_loss, rho)
            if self._trust.adapts(self._count + 1):
                self._trust.adapt(rho)
        self._trust.gamma = chosen.gamma
        self._last = delta
        return _Outcome(new_loss, rho, accepted=True)

    def _refuse(self, new_loss: float | None, rho: float | None) -> _Outcome:
        """Raises lambda and forgets the last step: the parameters didn't change."""
        self._trust.raise_damping()
        self._last = None
        return _Outcome(new_loss, rho, accepted=False)

    # Numbers that all ranks agree on ---------------------------------------------------------------------------------

    def _direction(self, gamma: float) -> list[Tensor]:
        solved = self._preconditioner.directions(gamma**2)
        scale = self._trust.damping + self._eta
        return [-(solved[p] if p in solved else _gradient(p) / scale).to(p.dtype) for p in self._parameters]

    def _fisher(self, replay: Replay) -> OutputFisher:
        """Linearises the model at the present parameters, on this rank's batch."""

        def run() -> tuple[Tensor, Tensor]:
            with self._preconditioner.paused():
                evaluation = replay.again()
            return evaluation.output, evaluation.loss

        return OutputFisher(run, self._preconditioner.model)

    def _product(self, fisher: OutputFisher, direction: list[Tensor]) -> OutputProduct:
        """Computes J u and H J u on this rank's batch."""
        u = dict(zip(self._parameters, direction, strict=True))
        try:
            return fisher.along(u, self._how)
        except NoForwardDerivative as error:
            if self._settings.differentiation != "auto":
                raise
            self._how = Differentiation.DOUBLE_BACKWARD
            _LOG.info("AdaptiveStep: %s; Jacobian products use the double backward from now on", error)
            return fisher.along(u, self._how)

    def _inner_products(self, basis: list[list[Tensor]], products: list[OutputProduct], share: float) -> InnerProducts:
        """Forms all inner products of the basis, summed over ranks in one all-reduce.

        Those of parameters and gradients alone are averaged over the ranks, too, so that ranks decide alike even if
        these numbers differ in the last bit.
        """
        m, w = len(basis), 1.0 / self._preconditioner.world.world_size
        gradient = [_gradient(p) for p in self._parameters]
        pairs = list(combinations_with_replacement(range(m), 2))
        parts = [w * inner_product(gradient, u) for u in basis]
        parts += [share * inner_product([products[i].change], [products[j].curvature]) for i, j in pairs]
        parts += [w * inner_product(basis[i], basis[j]) for i, j in pairs]
        sums = iter(self._sum_over_ranks(torch.stack([each.to(parts[0].device) for each in parts])))
        slopes = torch.tensor([next(sums) for _ in range(m)], dtype=torch.float64, device="cpu")
        fisher = torch.zeros(m, m, dtype=torch.float64, device="cpu")
        gram = torch.zeros_like(fisher)
        for matrix in (fisher, gram):
            for i, j in pairs:
                matrix[i, j] = matrix[j, i] = next(sums)
        return InnerProducts(slopes=slopes, fisher=fisher, gram=gram)

    def _loss_now(self, replay: Replay, batch: _Batch) -> float:
        """Returns the mean loss at the present parameters over all ranks' batches."""
        with torch.no_grad(), self._preconditioner.paused():
            loss = replay.again().loss.detach().double()
        return self._sum_over_ranks((batch.share * loss).reshape(1))[0]

    def _penalty(self) -> float:
        """Returns eta/2 |theta|^2."""
        if not self._eta:
            return 0.0
        values = [p.detach() for p in self._parameters]
        mean = inner_product(values, values).reshape(1) / self._preconditioner.world.world_size
        return 0.5 * self._eta * self._sum_over_ranks(mean)[0]

    def _sum_over_ranks(self, values: Tensor) -> list[float]:
        return reduce_flat([values], self._preconditioner.world)[0].tolist()


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # _measure gives every parameter one
    return parameter.grad.detach()
