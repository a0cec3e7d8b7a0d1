"""`kfdist.Preconditioner`: the public face of the pipeline."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn

from kfdist.capture.requests import Sampling
from kfdist.comm.communicator import Communicator, communicator, training_communicator
from kfdist.comm.together import on_rank_zero
from kfdist.curvature.auto import MeasuredCosts, measure_costs
from kfdist.errors import ConfigError, Interrupted, KfdistError
from kfdist.linalg.arithmetic import plain_arithmetic
from kfdist.links.link import AbstractLink
from kfdist.policies.staleness import Adoption, Asap
from kfdist.runtime.apply.attachment import ScalerNotice, warn_of_normalised
from kfdist.runtime.apply.rates import LearningRates, Scalar, finite_step
from kfdist.runtime.assembly import assemble
from kfdist.runtime.inspection import Inspection
from kfdist.runtime.invert.service import Service
from kfdist.runtime.left_out import LeftOutNotice
from kfdist.runtime.ownership import Ownership
from kfdist.runtime.plan.groups import refuse_applied_rows
from kfdist.runtime.plan.layers import StandingBlocks
from kfdist.runtime.plan.planner import Method, Plan, make_plan, needs_costs
from kfdist.runtime.settings import Settings, StepReport
from kfdist.runtime.state import check_state, is_of_now, pipeline_state, restore_pipeline
from kfdist.runtime.stated_loss import StatedLoss
from kfdist.types import Fisher, MetricSample, WeightSharing


class Preconditioner(StatedLoss, Inspection):
    """Second-order preconditioning of a model's gradients, over all ranks of a process group.

    Between `loss.backward()` and `optimizer.step()`, `step` replaces the gradients in `.grad` by (F + lambda I)^-1
    grad, block by block. All ranks must make it, with equal arguments, and call `step` equally often.

    What is measured: every forward in training mode, with gradients on and outside of `paused`, that a backward
    follows before the next `step`. Backwards of different forwards are micro-batches: with k of them, divide their
    losses by k. Those of one forward (an actor's and a critic's loss) are one micro-batch, of the sum of their losses.
    Forwards before one backward (siamese) see the same examples: a term of the loss goes through all of them. A
    backward whose gradients are gone before the next one, by `zero_grad`, counts for nothing; see `discard`.

    The loss is taken for a mean over dim 0 of the model's first tensor input (dim 1 where a module with
    `batch_first=False` is given it so); where it is another mean, say so with `batch`. A second loss that goes through
    the model without being trained on (a GAN's generator loss through its discriminator, a gradient penalty, an
    adversarial example) belongs inside `paused`.

    Make it after the model is on its device and has its dtype: `model.to` is refused afterwards, at the next step.
    Compiled code runs eagerly on steps that measure, one in `factor_period`; compile the model itself, so that this is
    known. Clipping gradients changes no statistics; clipping before `step` bounds what is preconditioned, clipping
    after it what the optimizer sees.

    Args:
        model: The model, also wrapped by DDP or torch.compile.
        method: An inverter's name, an inverter, or {glob on dotted module names: either}; the first match wins. A glob
            that names a module holds for everything inside it. "none" leaves all gradients as they are.
        damping: lambda of F + lambda I: a positive number, or a callable of the step.
        ema_decay: Largest weight rho of the past in the moving average of the statistics, in [0, 1).
        factor_period: Steps between two foldings of a block's statistics.
        inverse_period: Steps between two inversions of a block, a multiple of `factor_period`; or {step: period from
            there on}, the first at 0. All blocks are inverted where a period begins.
        fisher: Which output gradients make the Fisher: "empirical" uses those of the training loss; "mc" those of
            targets drawn from the model's predictions and "exact" those of all targets, both told by `observe`.
        weight_sharing: How `nn.Linear` treats the positions of a sequence: "expand" for a loss per position, "reduce"
            where they are pooled before the loss (Eschenhagen et al., arXiv 2311.00636).
        sampling: How much of a batch is measured; by default what 5 % of a forward and backward pay for.
        skip: Globs on the names of modules that, with everything inside them, are not preconditioned; of parameters,
            too, that methods on gradients would take.
        kl_clip: kappa of the KL clip, over all blocks and block by block (docs/methods/kfac.md): a positive number, or
            a callable of the step, the same on all ranks; None turns it off, and so does a callable that gives None or
            0, for that step.
        lr: Learning rate for the KL clip: a number, a callable of the step, or None to read an attached optimizer.
        adoption: When a finished inverse is taken into use: `kfdist.FixedLag(k)`, where `FixedLag(0)` is synchronous,
            or `kfdist.Asap(...)`; "asap" is `Asap()`.
        seed: Seeds every random choice, together with the block's name and the version.
        digest_period: Steps between two comparisons of the ranks' parameters; 0 turns them off.
        grad_scaler: The AMP scaler whose scale the loss is multiplied by.
        process_group: The ranks that train together; None: the default group, else this single process, unless
            torchrun's variables (RANK, WORLD_SIZE) say that it is one of several.
        link: None inverts in the ranks themselves; `kfdist.connect(...)` uses a service.
        costs: What inversions cost, for "auto"; None lets rank 0 measure it. Measured anew, it may choose otherwise:
            to load a state into a new Preconditioner, give it `costs` of the one that saved it.

    Raises:
        ConfigError: A value is out of range, a glob matches nothing, no layer can be preconditioned, or this is one of
            several processes that have no process group.
        EnvironmentFault: The ranks' machines differ in what numbers depend on, or the link cannot start.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method = "rs-kfac",
        *,
        damping: Scalar = 0.03,
        ema_decay: float = 0.95,
        factor_period: int = 10,
        inverse_period: int | Mapping[int, int] = 100,
        fisher: Fisher = "empirical",
        weight_sharing: WeightSharing = "expand",
        sampling: Sampling = Sampling(),
        skip: Sequence[str] = (),
        kl_clip: Scalar | None = 1e-3,
        lr: Scalar | None = None,
        adoption: Literal["asap"] | Adoption = "asap",
        seed: int = 0,
        digest_period: int = 100,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: Any = None,
        link: Service | AbstractLink | None = None,
        costs: MeasuredCosts | None = None,
    ) -> None:
        settings = Settings(
            damping=damping,
            ema_decay=ema_decay,
            factor_period=factor_period,
            inverse_period=inverse_period,
            fisher=fisher,
            weight_sharing=weight_sharing,
            sampling=sampling,
            skip=(skip,) if isinstance(skip, str) else tuple(skip),
            kl_clip=kl_clip,
            lr=lr,
            adoption=Asap() if adoption == "asap" else adoption,
            seed=seed,
            digest_period=digest_period,
        )
        world = training_communicator(process_group)
        if costs is None and needs_costs(method):  # from one rank: all have to choose alike
            costs = MeasuredCosts.from_json(on_rank_zero(world, lambda: measure_costs().to_json()))
        self._set_up(
            make_plan(model, method, settings, world_size=world.world_size, costs=costs), world, grad_scaler, link
        )

    # Construction ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_plan(
        cls,
        plan: Plan,
        *,
        grad_scaler: torch.amp.GradScaler | None = None,
        process_group: Any = None,
        link: Service | AbstractLink | None = None,
    ) -> Self:
        """Makes a Preconditioner that carries out a plan. All ranks must make it, with equal plans.

        Args:
            plan: What `kfdist.runtime.plan.planner.make_plan` returned, for as many ranks as the group has.
            grad_scaler: As for the constructor.
            process_group: The ranks that train together; None: the default group, else this single process.
            link: As for the constructor.

        Raises:
            ConfigError: The plan is for another number of ranks, or doesn't go with a GradScaler.
            EnvironmentFault: As for the constructor.
        """
        self = cls.__new__(cls)
        self._set_up(plan, communicator(process_group), grad_scaler, link)
        return self

    def _set_up(
        self,
        plan: Plan,
        world: Communicator,
        grad_scaler: torch.amp.GradScaler | None,
        link: Service | AbstractLink | None,
    ) -> None:
        if plan.world_size != world.world_size:
            raise ConfigError(f"the plan is for {plan.world_size} ranks, and there are {world.world_size}")
        if plan.device.type == "meta":
            raise ConfigError(
                "the model is on the meta device and has no values; give it some first, by to_empty(device=...) and "
                "its initialisation"
            )
        if grad_scaler is not None and grad_scaler.is_enabled():
            refuse_applied_rows(plan.groups, "a GradScaler scales the gradients")
        self._plan = plan
        self._world = world
        self._grad_scaler = grad_scaler
        self._rates = LearningRates(plan.settings.lr, needed=plan.settings.kl_clip is not None and bool(plan.blocks))
        self._folded = False
        self._closed = False
        parameters = {
            f"{block.layer}.{part.attribute}".lstrip("."): part.parameter
            for block in plan.blocks
            for part in block.parts
        }
        self._ownership = Ownership(parameters)
        self._parameters = list(parameters.values())
        self._blocks = StandingBlocks(plan.model, plan.blocks, plan.device)
        try:
            with plain_arithmetic(plan.device):
                self._assembly = assemble(plan, world, link, grad_scaler)
        except BaseException:
            self._ownership.give_up()
            raise
        self._scaler_notice = ScalerNotice(self._parameters, grad_scaler)
        self._left_out = LeftOutNotice(plan.settings.factor_period)

    # The step --------------------------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """Preconditions the gradients in `.grad`; between backward (and unscaling, reducing) and the optimizer's step.

        Collective: all ranks must call it.

        Raises:
            ModelChanged: A layer was replaced, resized, moved or converted (`model.to`) since construction.
            Interrupted: A stop was asked for, or the wait limit passed, inside an agreed wait; on all ranks alike.
            RanksDiverged: The ranks' parameters differ.
            ConfigError: There is a KL clip but no learning rate, or the attached optimizer's parameters were
                replaced by others after it was made.
            KfdistError: The gradients are still scaled, an optimizer is attached, or `close` was called.
        """
        self._refuse_if_attached("step")
        return self._step(self._rates_at)

    def update(self) -> StepReport:
        """Does all that `step` does except changing gradients, for callers that ask for `directions` themselves.

        Collective: all ranks must call it.

        Raises:
            The errors of `step`.
        """
        self._refuse_if_attached("update")
        return self._step(None)

    def _refuse_if_attached(self, call: str) -> None:
        if self.attached:
            raise KfdistError(
                f"{call}() was called, and the {type(self._rates.optimizer).__name__} that has this Preconditioner "
                f"does that at each of its own steps: leave out {call}(), or attach() if it was called"
            )

    def directions(self, damping: float) -> dict[nn.Parameter, Tensor]:
        """Returns (F + damping I)^-1 grad of every preconditioned parameter, from the snapshots in use.

        `.grad` is read and stays as it is; there is no KL clip. After `update`, which takes the newest snapshots in.

        Args:
            damping: lambda; without effect on methods that damp when they invert.
        """
        with plain_arithmetic(self._plan.device):
            return self.pipeline.directions(damping)

    def _rates_at(self, step: int) -> Callable[[nn.Parameter], float]:
        clips = self.pipeline.in_force.kl_clip(step) is not None
        self._rates.needed = clips and bool(self._plan.blocks)  # users and schedules turn the clip on and off
        return self._rates.at(step)

    def _step(
        self,
        rates: Callable[[int], Callable[[nn.Parameter], float]] | None,
        into: dict[nn.Parameter, Tensor] | None = None,
    ) -> StepReport:
        if self._closed:
            raise KfdistError("step() was called after close(); make a new Preconditioner")
        self._rates.look()
        self._blocks.check()
        self._folded = False
        if self._scaler_notice.done:
            self._scaler_notice.close()
        self._left_out.look(self._plan.coverage, self._plan.model, self.pipeline.capture.multiplied, level=4)
        with plain_arithmetic(self._plan.device):
            finite = finite_step(self._grad_scaler, self._rates.optimizer, self._plan.model.parameters())
            return self.pipeline.step(step_is_finite=finite, learning_rates=rates, into=into)

    def attach(self, optimizer: Any) -> Self:
        """Reads the optimizer's learning rates, per group, as they change, and runs `step` before each of its steps.

        Under a GradScaler the optimizer's step, and with it this one, is skipped on overflow. Where the optimizer is
        given a closure (as Lightning does), `step` runs at the closure's end, after its backward. Gradients are clipped
        before the optimizer's step, hence before they are preconditioned; to clip what the optimizer sees, call `step`
        yourself and clip after it.

        Args:
            optimizer: A torch optimizer, or a wrapper that has it as its `optimizer` (Accelerate's, Lightning's).

        Raises:
            ConfigError: An optimizer is attached already, this one steps none of the preconditioned parameters, or has
                no learning rates for the KL clip.
        """
        self._rates.attach(optimizer, self._parameters, lambda: self._step(self._rates_at))
        warn_of_normalised(self.groups, self._rates.optimizer)
        return self

    def hand_over(self, optimizer: torch.optim.Optimizer) -> Callable[[dict[nn.Parameter, Tensor]], StepReport]:
        """Leaves the steps to an optimizer that asks for directions and does all else, as `kfdist.Optimizer` does.

        Args:
            optimizer: Its learning rates are read; it steps parameters without a block by a method of its own.

        Returns:
            What does a step: as `step`, with its errors, but `.grad` stays and the directions go into the table given.
            The next step may write over its tensors: copy what is to outlive it.

        Raises:
            ConfigError: As for `attach`.
        """
        self._rates.attach(optimizer, self._parameters, None)
        self._left_out.instead = f"The {type(optimizer).__name__} steps them by a first-order method"
        return lambda into: self._step(self._rates_at, into)

    def request_stop(self) -> None:
        """Asks all ranks to stop at the same later step (`StepReport.stop`). Safe to call from a signal handler."""
        self.pipeline.agreement.request_stop()

    def beat(self, phase: str, samples: Sequence[MetricSample] = ()) -> None:
        """Tells the controller, if there is one, where this rank stands; never blocks."""
        self.pipeline.agreement.tell(self.pipeline.next_step, phase, [*self.samples(), *samples])

    # State -----------------------------------------------------------------------------------------------------------

    def state_dict(self, *, snapshots: bool = True) -> dict[str, Any]:
        """Returns this rank's state: its sums, the adopted snapshots, what is under way. Local, no collective.

        After `fold` and before the next `step` the sums are the totals of all ranks, good for any world size.

        Args:
            snapshots: Whether the adopted snapshots are in it, as bytes: as much memory again as they take, on the
                host, for as long as the state is kept. They are equal on all ranks: a checkpoint of all ranks' states
                needs them of one. A state without them goes on without inverses until the next ones come, so give it
                another rank's "snapshots" before it is loaded.
        """
        return pipeline_state(self.pipeline, folded=self._folded, snapshots=snapshots)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts this rank where `state` says; jobs under way are shipped again. Local, no collective.

        To be called before the first step, which then checks that all ranks begin in the same place. The controller, if
        there is one, hears where that is. What `state_dict` returns right now may be given back at any time, as
        Accelerate does, and changes nothing.

        Raises:
            KfdistError: A step was made or a state loaded before.
            CheckpointError: The state is of another format, model, or number of ranks.
            ConfigError: What users had changed while the run trained doesn't go with the configuration any more.
        """
        if is_of_now(self.pipeline, state):
            return
        with plain_arithmetic(self._plan.device):
            restore_pipeline(self.pipeline, state)
        # Until now its courier has told the controller of the step that it was started with.
        self._assembly.link.beat(self.pipeline.next_step, "running", ())

    def __getstate__(self) -> NoReturn:
        """Refuses to be copied or pickled.

        Raises:
            KfdistError: Always.
        """
        raise KfdistError(
            "a Preconditioner can't be copied or pickled: it measures one model and inverts in threads or elsewhere; "
            "make one of the model's copy, and give it what state_dict() returned by load_state_dict()"
        )

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would raise, and changes nothing."""
        if not is_of_now(self.pipeline, state):
            check_state(self.pipeline, state)

    def fold(self) -> None:
        """Collective: every rank's sums become the mean of all ranks' sums, so that any rank's state speaks for all."""
        with plain_arithmetic(self._plan.device):
            self.pipeline.reducer.average()
        self._folded = True

    def close(self) -> None:
        """Completes what is in flight, removes the hooks and stops the courier. All ranks must call it; safe twice.

        The controller, if there is one, hears that the run has finished, or stopped where all ranks agreed on that,
        unless `beat` has told it how the run ended.
        """
        if not self._closed:
            self._let_go()
            self._assembly.close()

    def abandon(self) -> None:
        """Stops measuring and stops the courier without any collective: for a rank that fails or lost its peers.

        The controller, if there is one, hears that the run has failed.
        """
        was_closed = self._closed
        self._let_go()
        self._assembly.abandon(is_failure=not was_closed)

    def _let_go(self) -> None:
        """Leaves the model and the optimizer as they were."""
        self._closed = True
        self._rates.detach()
        self._scaler_notice.close()
        self._ownership.give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An interruption comes to all ranks alike; after an error the others may never enter a collective.
        if kind is None or issubclass(kind, Interrupted):
            self.close()
        else:
            self.abandon()
