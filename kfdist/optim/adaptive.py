"""`kfdist.AdaptiveStep`: the self-tuning step of the original K-FAC paper (algorithms.md 1.2)."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from kfdist.capture.requests import Sampling
from kfdist.comm.reduce import reduce_flat
from kfdist.errors import CheckpointError, Interrupted, LossNotFinite, ModelChanged
from kfdist.links.link import AbstractLink
from kfdist.optim.adaptive_settings import AdaptiveReport, AdaptiveSettings, Trust
from kfdist.optim.network_fisher import NetworkFisher, gradient_of
from kfdist.optim.quadratic_model import ModelStep, gram, minimise_model
from kfdist.optim.replay import Closure, Evaluation, Replay
from kfdist.optim.requirements import FIXED, check_arguments
from kfdist.policies.staleness import FixedLag
from kfdist.runtime.invert.service import Service
from kfdist.runtime.plan.planner import Method
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.seeds import seed_from

_ROUNDING = 8.0
"""Accuracy of inner products, in units in the last place of the parameters' dtype."""


@dataclass(frozen=True)
class _Batch:
    """The step's batch.

    Attributes:
        share: This rank's part of all terms.
        loss: The mean over all ranks before the step.
        part_loss: This rank's on the examples whose statistics are measured; None where, on some rank, all are.
    """

    share: float
    loss: float
    part_loss: Tensor | None


@dataclass(frozen=True)
class _Parts:
    """Which of this rank's examples the curvature is measured on; None: all of them.

    Attributes:
        statistics: Those of the preconditioner's statistics.
        model: Those of the quadratic model.
    """

    statistics: Tensor | None = None
    model: Tensor | None = None


@dataclass(frozen=True)
class _Candidate:
    """A step that may be made.

    Attributes:
        gamma: The root of the damping of the direction.
        direction: Delta, by parameter.
        model: The best step in the span of it and the last step.
    """

    gamma: float
    direction: list[Tensor]
    model: ModelStep


@dataclass(frozen=True)
class _Outcome:
    """What became of a step.

    Attributes:
        new_loss: The mean over all ranks after it; None where it wasn't looked at.
        rho: The reduction ratio, likewise.
        accepted: Whether it stands.
    """

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
        preconditioner: Made with kl_clip=None and adoption=FixedLag(k), k = 0 unless others invert. Its
            `damping` has no effect, and the damping rule "relative" is refused. Where the method damps at the inversion
            (`kfac`), give `AdaptiveSettings(gamma_search=False)`; `KfacEigen(damping_rule="pi")` has the same factored
            damping and allows the search.
        loss: "mse", "cross_entropy" or "binary_cross_entropy" (on logits): the distribution that the preconditioner's
            "mc" and "exact" Fisher assume, with mean reduction; None if the closure calls `preconditioner.observe`
            itself (with a target, say). The F of the quadratic model always follows from the closure's loss.
        weight_decay: eta, the l2 coefficient; part of the gradient and of the model.
        damping: The first lambda; None takes the mean curvature of the first batch, tr F over the number of parameters.
        settings: Periods, factors, bounds and switches; the paper's if None.

    Raises:
        ConfigError: A value is out of range, the preconditioner doesn't fit, or nothing of the model is trained.
    """

    def __init__(
        self,
        preconditioner: Preconditioner,
        loss: str | None = "mse",
        weight_decay: float = 0.0,
        damping: float | None = None,
        *,
        settings: AdaptiveSettings | None = None,
    ) -> None:
        self._settings = settings or AdaptiveSettings()
        check_arguments(preconditioner, loss, weight_decay, damping, gamma_search=self._settings.gamma_search)
        self._preconditioner = preconditioner
        preconditioner.pipeline.in_force.fixed |= dict.fromkeys(FIXED, "AdaptiveStep, which trains the model, sets it")
        self._loss = loss if preconditioner.settings.fisher != "empirical" else None
        self._eta = float(weight_decay)
        self._trust = Trust(self._settings, 1.0 if damping is None else float(damping), self._eta)
        self._undecided = damping is None
        # Inverses have the eigenpairs that the smallest gamma of a step will need.
        preconditioner.pipeline.in_force.stand_in = lambda: min(self._trust.candidates(self._count + 1)) ** 2
        named = [(name, p) for name, p in preconditioner.model.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters = [p for _, p in named]
        self._accuracy = _ROUNDING * max(torch.finfo(p.dtype).eps for p in self._parameters)
        self._fisher = NetworkFisher(preconditioner, self._parameters, self._settings.differentiation)
        self._last: list[Tensor] | None = None
        self._count = 0

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        loss: str = "mse",
        weight_decay: float = 0.0,
        *,
        method: Method = "kfac",
        link: Service | AbstractLink | None = None,
        process_group: Any = None,
        seed: int = 0,
    ) -> Self:
        """Makes it with a preconditioner that fits: sampled Fisher, measured at every step, inverted every fifth.

        Args:
            model: The model, on its device.
            loss: As for the constructor.
            weight_decay: As for the constructor.
            method: As for `kfdist.Preconditioner`.
            link: As for `kfdist.Preconditioner`.
            process_group: As for `kfdist.Preconditioner`.
            seed: Of targets that are drawn, and of the examples that are measured.

        Returns:
            The step; close it when training is over, or use it as a context manager.
        """
        preconditioner = Preconditioner(
            model,
            method,
            factor_period=1,
            inverse_period=5,
            fisher="mc",
            sampling=Sampling(examples_fraction=1.0),
            kl_clip=None,
            adoption=FixedLag(0),
            seed=seed,
            process_group=process_group,
            link=link,
        )
        late = all(group.inverter.produces.damping_at_apply for group in preconditioner.groups)
        try:
            return cls(preconditioner, loss, weight_decay, settings=AdaptiveSettings(gamma_search=late))
        except BaseException:
            preconditioner.abandon()
            raise

    def step(self, closure: Closure, *batch: Tensor) -> AdaptiveReport:
        """Makes one step of training. Collective: all ranks must call it.

        Given the batch, curvature is measured on a part of the examples (`AdaptiveSettings.statistics_fraction`,
        `model_fraction`), drawn anew at every step. Without, all of it is, at a higher price (docs/methods/kfac.md).

        Args:
            closure: Runs the model on this step's batch and returns (output, loss) without a backward, or (output,
                loss, examples) if the loss averages `examples` terms (unmasked tokens, say) rather than dim 0 of the
                output. `output` is the tensor that the loss was computed from; the loss must depend on the model
                through it alone. It is called up to eight times and must use the same data each time; BatchNorm's
                buffers and torch's generators are put back in between, so that dropout draws the same masks.
            *batch: What the closure is called with: tensors with the batch's examples along dim 0. It must take fewer
                of them as well, with a finite loss of any two (a mask that leaves out all of them makes none).

        Returns:
            What was done. Afterwards `.grad` holds the gradient of the objective.

        Raises:
            LossNotFinite: The loss is infinite or NaN before the step, on some rank; nothing was changed.
            KfdistError: The closure returned something else than it must, or the batch is none.
            Interrupted: By the preconditioner; the step was not made, and buffers and generators are as before it.
            ModelChanged: A parameter was frozen since construction: the quadratic model is one of all of them.
        """
        self._refuse_frozen()
        replay = Replay(closure, batch, self._preconditioner.model, self._parameters[0].device)
        parts = self._parts(replay.rows)
        measured = self._measure(replay, parts)
        if self._undecided:
            self._trust = Trust(self._settings, self._first_damping(replay, measured, parts), self._eta)
            self._undecided = False
        try:
            done = self._preconditioner.update()
        except Interrupted:  # the step will be made again, perhaps from a checkpoint written now
            replay.undo()
            raise
        damping = self._trust.damping
        chosen = self._choose(replay, measured, parts)
        outcome = self._move(replay, measured, parts, chosen)
        coefficients = (*chosen.model.coefficients, 0.0) if chosen is not None else (0.0, 0.0)
        report = AdaptiveReport(
            step=self._count,
            loss=measured.loss,
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
    def preconditioner(self) -> Preconditioner:
        """What it measures and inverts with."""
        return self._preconditioner

    def close(self) -> None:
        """Closes the preconditioner. All ranks must call it; safe twice."""
        self._preconditioner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._preconditioner.__exit__(*error)

    @property
    def damping(self) -> float:
        """The lambda at which the next step starts; 1 before the first one, where it isn't given."""
        return self._trust.damping

    def state_dict(self) -> dict[str, Any]:
        """Returns lambda, gamma, the numbers of steps and rejections, and the last step by parameter name.

        Equal on all ranks.
        """
        last = self._last and dict(zip(self._names, (each.clone() for each in self._last), strict=True))
        trust = {"damping": self._trust.damping, "gamma": self._trust.gamma, "rejected": self._trust.rejected}
        return {"steps": self._count, **trust, "last": last}

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
        self._undecided = self._undecided and not self._count
        self._trust.damping = float(state["damping"])
        self._trust.gamma = float(state["gamma"])
        self._trust.rejected = int(state.get("rejected", 0))

    def _refuse_frozen(self) -> None:
        frozen = [name for name, p in zip(self._names, self._parameters, strict=True) if not p.requires_grad]
        if frozen:
            raise ModelChanged(
                f"parameter {frozen[0]!r} was frozen after the AdaptiveStep was made, which moves all that were "
                "trained then; close it and make a new one"
            )

    # The verbs -------------------------------------------------------------------------------------------------------

    def _parts(self, rows: int) -> _Parts:
        """Draws the examples that are measured, of `rows` that this rank's batch has; apart, where there are enough."""
        if not rows:
            return _Parts()
        label = f"adaptive/{self._preconditioner.settings.seed}/{self._count}/{self._preconditioner.world.rank}"
        generator = torch.Generator(device="cpu").manual_seed(seed_from(label))
        drawn = torch.randperm(rows, generator=generator, dtype=torch.int64, device="cpu")

        def some(order: Tensor, fraction: float) -> Tensor | None:
            # Two at least, if there are: BatchNorm takes no single one.
            return None if fraction == 1 else order[: max(min(2, rows), round(fraction * rows))]

        settings = self._settings
        return _Parts(some(drawn, settings.statistics_fraction), some(drawn.flip(0), settings.model_fraction))

    def _measure(self, replay: Replay, parts: _Parts) -> _Batch:
        """Runs forward and backward; `.grad` becomes the gradient of the objective over all ranks' batches."""
        for parameter in self._parameters:
            parameter.grad = None
        apart = parts.statistics is not None
        with self._preconditioner.paused() if apart else nullcontext():
            evaluation = replay.first()
        n = float(evaluation.examples)
        loss = evaluation.loss.detach().double()
        whole = float(not apart)
        totals = self._fisher.sum_over_ranks(torch.stack([loss.new_tensor(n), n * loss, loss.new_tensor(whole)]))
        total, mean = totals[0], totals[1] / totals[0]
        if not math.isfinite(mean):
            replay.undo()
            raise LossNotFinite(
                f"the loss is {mean} before step {self._count}, at parameters that the last step accepted: look "
                "for bad values in the batch. Nothing was changed; continue with the next batch, or stop"
            )
        if not apart:
            self._tell(evaluation)
        evaluation.loss.backward()
        self._reduce_gradients(n / total)
        part_loss = self._measure_statistics(replay, parts.statistics) if parts.statistics is not None else None
        return _Batch(share=n / total, loss=mean, part_loss=None if totals[2] else part_loss)

    def _measure_statistics(self, replay: Replay, rows: Tensor) -> Tensor:
        """Runs forward and backward on some examples for the preconditioner alone; `.grad` stays as it is.

        Returns:
            Their loss.
        """
        gradients = [gradient_of(p) for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None

        def measure(evaluation: Evaluation) -> None:
            self._tell(evaluation)
            if self._preconditioner.settings.fisher == "empirical":  # the others were measured when they were observed
                evaluation.loss.backward()

        try:
            with torch.enable_grad():
                return replay.again(rows, then=measure).loss.detach()
        finally:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient

    def _tell(self, evaluation: Evaluation) -> None:
        """Tells the preconditioner what it has to know of a forward that it measures, before its backward."""
        if evaluation.stated:
            self._preconditioner.batch(examples=evaluation.examples)
        if self._loss is not None:
            self._preconditioner.observe(evaluation.output, loss=self._loss)

    def _reduce_gradients(self, share: float) -> None:
        """Averages the gradients over ranks, weighted by their shares of the terms, and adds eta theta."""
        for dtype in dict.fromkeys(p.dtype for p in self._parameters):
            members = [p for p in self._parameters if p.dtype == dtype]
            own = [torch.zeros_like(p) if p.grad is None else p.grad * share for p in members]
            for parameter, gradient in zip(members, reduce_flat(own, self._preconditioner.world), strict=True):
                parameter.grad = gradient.add_(parameter.detach(), alpha=self._eta) if self._eta else gradient

    def _first_damping(self, replay: Replay, batch: _Batch, parts: _Parts) -> float:
        """Returns the mean curvature; 1 where the model's derivatives overflow."""
        seed = self._preconditioner.settings.seed
        mean = self._fisher.mean_curvature(replay, parts.model, batch.share, seed)
        settings = self._settings
        return min(max(mean, settings.smallest_damping), settings.largest_damping) if math.isfinite(mean) else 1.0

    def _choose(self, replay: Replay, batch: _Batch, parts: _Parts) -> _Candidate | None:
        """Tries each candidate for gamma and returns the step with the smallest M; None if none has a finite M."""
        last = [self._last] if self._settings.momentum and self._last is not None else []
        gammas = self._trust.candidates(self._count + 1)
        directions = [self._direction(gamma) for gamma in gammas]
        products = self._fisher.products(replay, parts.model, [*directions, *last])
        along_last = products[len(directions) :]
        best: _Candidate | None = None
        for gamma, direction, product in zip(gammas, directions, products, strict=False):
            model = minimise_model(
                self._fisher.inner_products([direction, *last], [product, *along_last], batch.share),
                damping=self._trust.damping,
                weight_decay=self._eta,
                relative_accuracy=self._accuracy,
            )
            if model is not None and (best is None or model.change < best.model.change):
                best = _Candidate(gamma, direction, model)
        return best

    def _move(self, replay: Replay, batch: _Batch, parts: _Parts, chosen: _Candidate | None) -> _Outcome:
        """Moves the parameters, measures the objective and adapts lambda; or undoes a step that made it worse.

        Where lambda isn't due, a step that lowers the objective on the statistics' examples just stands.
        """
        if chosen is None:
            return self._refuse(None, None)
        c, last = chosen.model.coefficients, self._last
        delta = [c[0] * each for each in chosen.direction]
        if len(c) > 1 and last is not None:
            delta = [each.add_(previous, alpha=c[1]) for each, previous in zip(delta, last, strict=True)]
        adapts = self._trust.adapts(self._count + 1)
        saved = [p.detach().clone() for p in self._parameters] if self._settings.rejection else []
        before = self._penalty()
        with torch.no_grad():
            for parameter, each in zip(self._parameters, delta, strict=True):
                parameter.add_(each)
        grown = self._penalty() - before
        new_loss = rho = None
        if adapts or (self._settings.rejection and not self._falls(replay, batch, parts, grown)):
            new_loss = self._loss_now(replay, batch)
            change = (new_loss - batch.loss) + grown
            predicted = chosen.model.undamped_change
            rho = change / predicted if predicted else math.nan
            if self._settings.rejection and not change <= 0.0:
                with torch.no_grad():
                    for parameter, values in zip(self._parameters, saved, strict=True):
                        parameter.copy_(values)
                return self._refuse(new_loss, rho)
            if adapts:
                self._trust.adapt(rho)
        self._trust.gamma = chosen.gamma
        self._trust.accept()
        self._last = delta
        return _Outcome(new_loss, rho, accepted=True)

    def _refuse(self, new_loss: float | None, rho: float | None) -> _Outcome:
        """Raises lambda and forgets the last step: the parameters didn't change."""
        self._trust.reject()
        self._last = None
        return _Outcome(new_loss, rho, accepted=False)

    # Numbers that all ranks agree on ---------------------------------------------------------------------------------

    def _direction(self, gamma: float) -> list[Tensor]:
        solved = self._preconditioner.directions(gamma**2)
        scale = self._trust.damping + self._eta
        return [-(solved[p] if p in solved else gradient_of(p) / scale).to(p.dtype) for p in self._parameters]

    def _loss_now(self, replay: Replay, batch: _Batch) -> float:
        """Returns the mean loss at the present parameters over all ranks' batches."""
        with torch.no_grad(), self._preconditioner.paused():
            loss = replay.again().loss.detach().double()
        return self._fisher.sum_over_ranks((batch.share * loss).reshape(1))[0]

    def _falls(self, replay: Replay, batch: _Batch, parts: _Parts, grown: float) -> bool:
        """Says of a part of the batch whether the objective fell on it, at that part of the price.

        It is a part that the model isn't made of, where the fractions leave room for both. False where there is none,
        and after a step that was rejected, as this one may well be.
        """
        if batch.part_loss is None or self._trust.rejected:
            return False
        with torch.no_grad(), self._preconditioner.paused():
            loss = replay.again(parts.statistics).loss.detach().double()
        change = self._fisher.sum_over_ranks((batch.share * (loss - batch.part_loss.double())).reshape(1))[0]
        return change + grown <= 0.0

    def _penalty(self) -> float:
        """Returns eta/2 |theta|^2."""
        if not self._eta:
            return 0.0
        mean = gram([[p.detach() for p in self._parameters]]).reshape(1) / self._preconditioner.world.world_size
        return 0.5 * self._eta * self._fisher.sum_over_ranks(mean)[0]
