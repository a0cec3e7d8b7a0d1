"""`kfdist.Optimizer`: second-order training in one line."""

import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, Unpack

import torch
from torch import Tensor, nn

from kfdist import checks
from kfdist.curvature.auto import AUTO
from kfdist.curvature.blocks.base import ParameterPart
from kfdist.curvature.by_width import ByWidth
from kfdist.curvature.inverters.ekfac_adam import EkfacAdam
from kfdist.errors import CheckpointError, ConfigError, KfdistError, KfdistWarning
from kfdist.optim.curvature_options import Curvature
from kfdist.optim.graft import (
    Graft,
    Members,
    adamw_updates,
    grafted,
    move_along,
    move_by_average,
    move_by_momentum,
    rate_of,
    step_by_adamw,
)
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.plan.layers import check_model
from kfdist.runtime.preconditioner import Preconditioner
from kfdist.runtime.settings import StepReport

Groups = Iterable[nn.Parameter] | Iterable[dict[str, Any]]
"""Parameters, or groups of them with settings of their own, as torch's optimizers take them."""

BASIS_PERIOD, EMA_DECAY = 20, 0.8
"""What "auto" has under AdamW's graft in the place of the Preconditioner's 100 and .95: steps between two bases, and
the largest weight of the past in statistics (docs/decisions/0033). At 512 wide a core decomposes both factors in a
quarter of the time in which it multiplies by their bases in so many steps."""


class Optimizer(torch.optim.Optimizer):
    r"""Steps a model along second-order directions, and what has none by a first-order method.

    It makes a `kfdist.Preconditioner` of the model, which measures in forward and backward, and does all that comes
    after: V being the gradient of a parameter and U = (F + lambda I)^-1 V its direction,

        graft     what a direction becomes        momentum of it                  what parameters without a block get
        "adamw"   S = |a| U / |U|                 average, bias-corrected         AdamW
        "sgd"     S = |V| U / |U|                 sum that fades by beta1         SGD with momentum
        None      S = U, clipped (`kl_clip`)      sum that fades by beta1         AdamW

    and in each row theta <- (1 - lr weight_decay) theta - lr M for the momentum M of S. Here a = V / (sqrt(v_hat) +
    eps), whose average over time AdamW steps along, with the bias-corrected second moment v_hat. So with a graft, as
    Anil et al. (arXiv 2002.09018) have it for Shampoo, a parameter's step has the direction of the curvature and the
    length of the method whose learning rate and schedule were tuned before. A direction that is zero, not finite or
    uphill (<U, V> <= 0) is replaced by a, or by V; the device decides, nothing waits for it.

    A direction of `ekfac-adam`, `soap` or `kl-shampoo` has a size and momentum of its own, and nothing replaces it:
    theta <- (1 - lr weight_decay) theta - lr U, with AdamW's learning rate. `betas` and `eps` are then those of
    parameters without a block; these methods have their own.

    With several ranks all of them must make it, and step equally often, with DDP's or otherwise averaged gradients.

    Args:
        model: The model, on its device and of its dtype, also wrapped by DDP or torch.compile; or a Preconditioner of
            it, with no learning rate and, under a graft, no KL clip, which this optimizer closes with itself.
        lr: Learning rate: the graft's. A tensor of one number on the CPU is read at each step, as schedulers change it
            in place.
        betas: Decay of momentum, which is AdamW's first moment too, and decay of AdamW's second moment.
        eps: Added to the root of AdamW's second moment.
        weight_decay: Decoupled from the gradient, for all parameters.
        params: The model's parameters if None; else parameters, or groups with their own lr, betas, eps and
            weight_decay. Others than the model's may be among them.
        graft: As above.
        **curvature: What `kfdist.Preconditioner` is made with, which documents it. Here `method` is "auto" if not
            given: `ekfac-adam` for matrices up to 8,192 wide, or with another graft `kfac-eigen` up to 1,024 and
            `rs-kfac` beyond; wider ones, tables, norms and lone vectors have no block. With that `ekfac-adam`
            `ema_decay` is .8 if not given; where no period is given either, layers up to 1,024 wide have a new basis
            every 20 steps, and wider ones every `inverse_period` steps. Any of Preconditioner's own methods and tables
            can be given instead (`kfdist.Auto()` is its "auto", by measured cost).

    Attributes:
        preconditioner: Measures, inverts and says what it does: `coverage()`, `observe()`, `paused()`.

    Raises:
        ConfigError: A value is out of range, or the Preconditioner refuses its own.
        EnvironmentFault: As for `kfdist.Preconditioner`.
    """

    def __init__(
        self,
        model: nn.Module | Preconditioner,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        params: Groups | None = None,
        graft: Graft | None = "adamw",
        **curvature: Unpack[Curvature],
    ) -> None:
        self.graft = graft
        bare = model.model if isinstance(model, Preconditioner) else model
        check_model(bare)
        given = bare.parameters() if params is None else params
        super().__init__(given, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.preconditioner = _preconditioner_of(model, graft, curvature)
        try:
            check_graft(graft, self.preconditioner.groups)
            self._solve = self.preconditioner.hand_over(self)
        except ConfigError:
            if self.preconditioner is not model:
                self.preconditioner.abandon()
            raise
        if graft is not None:
            self.preconditioner.pipeline.in_force.fixed["kl_clip"] = "grafting gives each step its length"
        self._directions: dict[nn.Parameter, Tensor] = {}
        self._parts: list[tuple[ParameterPart, ...]] | None = None
        self._blocked: set[nn.Parameter] = set()
        self._normalised: set[nn.Parameter] = set()
        self._finished: set[nn.Parameter] = set()
        self._replaced: Tensor | int = 0
        self._solved = False
        _warn_of_mixed(self.preconditioner.groups, type(self).__name__)

    # The step --------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step, between backward (and unscaling, clipping) and `zero_grad`.

        Collective with several ranks. `.grad` stays as it is.

        Args:
            closure: Runs forward and backward and returns the loss, as Lightning's does.

        Returns:
            What the closure returned.

        Raises:
            The errors of `kfdist.Preconditioner.step`; then no parameter has changed.
            KfdistError: A gradient is sparse.
            ConfigError: A learning rate was replaced by a tensor that a step would have to wait for; or all parameters
                were replaced in its groups before the first step, as DeepSpeed does.
        """
        loss = None
        if closure is not None and self._solved:
            raise KfdistError(
                "step() was given a closure after precondition(), which has solved for the gradients of before; call "
                "the closure before precondition(), and step() without one"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate_of(group)  # is refused before anything is done
        if not self._solved:
            self.precondition()
        try:
            with torch.no_grad():
                self._refuse_sparse()
                for group in self.param_groups:
                    self._step_group(group)
        finally:
            self._directions, self._solved = {}, False
        return loss

    def precondition(self) -> StepReport:
        """Does the first half of the next `step`: all that the ranks do together, with its errors.

        For loops that want its report, or that have a GradScaler skip `step` on overflow while the statistics' schedule
        goes on. To be called before each step, or before none.
        """
        self._directions, self._solved = {}, False
        report = self._solve(self._directions)
        self._follow_parts()
        self._finished = self._normalised & self._directions.keys()
        self._solved = True
        return report

    def _follow_parts(self) -> None:
        """Finds out which parameters have blocks, again where a block has taken in or left out its bias."""
        groups = self.preconditioner.groups
        parts = [block.parts for group in groups for block in group.blocks]
        if parts == self._parts:
            return
        self._parts = parts
        self._blocked = _parameters_of(groups) - _mixed(groups)
        self._normalised = self._blocked & _parameters_of(g for g in groups if g.inverter.produces.normalised)

    @property
    def replaced(self) -> int:
        """How many directions gave way to the graft's update since this was made, over all parameters and steps.

        Asking waits for the device.
        """
        return int(self._replaced)

    def _step_group(self, group: dict[str, Any]) -> None:
        finished: list[nn.Parameter] = []
        blocked: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for p in group["params"]:
            if p.grad is not None:
                kind = finished if p in self._finished else blocked if p in self._blocked else others
                kind.append(p)
        if finished:
            members = self._members(group, finished)
            for state in members.states:  # of the time before the first inverse, or of AdamW: the block has its own
                if state:
                    state.clear()
            move_along(members, [self._directions[p] for p in finished])
        if blocked:
            members, directions = self._members(group, blocked), [self._direction(p) for p in blocked]
            if self.graft == "adamw":
                move_by_average(members, self._grafted(members, directions, adamw_updates(members)))
            elif self.graft == "sgd":
                move_by_momentum(members, self._grafted(members, directions, members.gradients))
            else:
                move_by_momentum(members, directions)
        if others:
            members = self._members(group, others)
            if self.graft == "sgd":
                move_by_momentum(members, members.gradients)
            else:
                step_by_adamw(members)

    def _refuse_sparse(self) -> None:
        gradients = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        if sparse := [p for p, gradient in gradients if gradient is not None and gradient.is_sparse]:
            raise KfdistError(
                f"{len(sparse)} parameters, the first of shape {tuple(sparse[0].shape)}, have sparse gradients, which "
                "neither grafts nor AdamW take; make the embedding with sparse=False, or leave its parameters out of "
                "`params` and step them by torch.optim.SparseAdam"
            )

    def _members(self, group: dict[str, Any], having: list[nn.Parameter]) -> Members:
        gradients = [p.grad for p in having if p.grad is not None]
        return Members(
            parameters=list(having), gradients=gradients, states=[self.state[p] for p in having], group=group
        )

    def _grafted(self, members: Members, directions: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
        steps, lengths = grafted(directions, members.gradients, updates)
        self._replaced = self._replaced + (~lengths.usable).sum()
        self.preconditioner.pipeline.grafts.note(members.parameters, lengths, self._replaced)
        return steps

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """Returns U, where there is an inverse; else what moves the parameter as if it had no block."""
        assert parameter.grad is not None, "members have gradients"
        if parameter in self._directions:
            return self._directions[parameter]
        return parameter.grad if self.graft is None else torch.zeros_like(parameter.grad)

    # Groups and state ------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, as torch's optimizers do; those that the Preconditioner doesn't know have no block.

        Raises:
            ConfigError: A setting of the group is out of range.
        """
        super().add_param_group(param_group)
        try:
            check_settings({**self.param_groups[-1], "graft": self.graft})
        except ConfigError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Returns torch's two entries, with this rank's Preconditioner's state as a third, "preconditioner".

        It refers to tensors in use, as torch's does: save or copy it before the next step. Of several ranks each saves
        its own; or rank 0's is for all after `preconditioner.fold()`, which all ranks call.
        """
        return {**self.moments_state(), "preconditioner": self.preconditioner.state_dict()}

    def moments_state(self) -> dict[str, Any]:
        """Returns torch's two entries alone, for who saves the Preconditioner's state by itself."""
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a saved state, bit for bit. To be called before the first forward, on all ranks, once.

        What `state_dict` returns right now may be given back at any time, as Accelerate does whenever it prepares an
        optimizer.

        One without a Preconditioner's part, as torch.optim.AdamW's, brings moments and settings alone; blocks of
        normalised methods begin their moments anew.

        Raises:
            CheckpointError: It is of another model, or the Preconditioner's part is of another method or number of
                ranks.
            KfdistError: A step was made, or a state loaded before.
        """
        saved = state_dict.get("preconditioner")
        if saved is not None:
            self.preconditioner.check_state(saved)
        self._check_shapes(state_dict)
        super().load_state_dict({"state": state_dict["state"], "param_groups": state_dict["param_groups"]})
        for state in self.state.values():
            if "step" in state:  # whatever device the file was read to: reading it must not wait for one
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):  # likewise
                group["lr"] = group["lr"].cpu()
        # Accelerate loads what a new optimizer has into itself; a Preconditioner takes a state once, and not this one.
        if saved is not None and (saved["step"], saved["statistics_step"]) != (0, -1):
            self.preconditioner.load_state_dict(saved)

    def _check_shapes(self, state_dict: Mapping[str, Any]) -> None:
        sizes = [len(group["params"]) for group in self.param_groups]
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        if sizes != saved:
            raise CheckpointError(
                f"the optimizer's state has groups of {saved} parameters and this optimizer has {sizes}; load it into "
                "an optimizer made of the same model with the same groups"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for place, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
            for name, value in state_dict["state"].get(number, {}).items():
                if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"parameter {place} has {name} of shape {tuple(value.shape)} in the optimizer's state and has "
                        f"shape {tuple(parameter.shape)} itself; the state is of another model"
                    )

    def __getstate__(self) -> NoReturn:
        """Refuses to be copied or pickled, of which torch's own would leave a part behind.

        Raises:
            KfdistError: Always.
        """
        raise KfdistError(
            "a kfdist.Optimizer can't be copied or pickled: it measures one model and inverts in threads or elsewhere; "
            "make one of the model's copy, and give it what state_dict() returned by load_state_dict()"
        )

    # The end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes the Preconditioner; parameters can't be stepped any more. All ranks must call it; safe twice."""
        self.preconditioner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.preconditioner.__exit__(kind, error, trace)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuses a graft that isn't there, and numbers of a parameter group that are out of range.

    Raises:
        ConfigError: With the setting as its path.
    """
    if settings["graft"] is not None:
        checks.choice("graft", settings["graft"], typing.get_args(Graft), hint="or None")
    checks.number("lr", rate_of(settings), least=0)
    for name in ("eps", "weight_decay"):
        checks.number(name, settings[name], least=0)
    betas = settings["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ConfigError(f"is {betas!r}; two numbers are needed, such as (0.9, 0.999)", path="betas")
    for number, beta in enumerate(betas):
        checks.number(f"betas[{number}]", beta, least=0, below=1)


def check_graft(graft: Graft | None, groups: Iterable[BlockGroup]) -> None:
    """Refuses SGD's graft beside methods that go by AdamW's learning rate.

    Raises:
        ConfigError: With "graft" as its path.
    """
    normalised = {group.inverter.name for group in groups if group.inverter.produces.normalised}
    if normalised and graft == "sgd":
        raise ConfigError(
            f"is 'sgd', and {', '.join(sorted(normalised))} goes by AdamW's learning rate; leave graft out",
            path="graft",
        )


def _mixed(groups: Iterable[BlockGroup]) -> set[nn.Parameter]:
    """Returns the parameters of which blocks have some rows only, or blocks with directions of several kinds.

    A direction of one size beside one of another, or beside a gradient, can't be given one length: such a parameter is
    stepped as if it had no block.
    """
    numbers: dict[nn.Parameter, int] = {}
    kinds: dict[nn.Parameter, set[bool]] = {}
    for group in groups:
        for part in (part for block in group.blocks for part in block.parts):
            numbers[part.parameter] = numbers.get(part.parameter, 0) + part.of(part.parameter).numel()
            kinds.setdefault(part.parameter, set()).add(group.inverter.produces.normalised)
    return {p for p, number in numbers.items() if number < p.numel() or len(kinds[p]) > 1}


def _warn_of_mixed(groups: Sequence[BlockGroup], optimizer: str) -> None:
    """Warns of parameters whose blocks come to nothing, though the Preconditioner has them."""
    mixed = _mixed(groups)
    parts = [(block, part) for group in groups for block in group.blocks for part in block.parts]
    names = {f"{block.layer}.{part.attribute}".lstrip(".") for block, part in parts if part.parameter in mixed}
    if names:
        listed = ", ".join(map(repr, sorted(names)))
        warnings.warn(
            f"{len(names)} parameters ({listed}) have blocks of a part of their rows, or of methods whose directions "
            f"differ in size, and a step has one length: the {optimizer} steps them by a first-order method, "
            "whatever coverage() says. Give all their blocks methods of one kind, or leave all of them out by `skip`",
            KfdistWarning,
            stacklevel=3,
        )


def _parameters_of(groups: Iterable[BlockGroup]) -> set[nn.Parameter]:
    return {parameter for group in groups for block in group.blocks for parameter in block.parameters()}


def _preconditioner_of(model: nn.Module | Preconditioner, graft: Graft | None, curvature: Curvature) -> Preconditioner:
    kl_clip = model.settings.kl_clip if isinstance(model, Preconditioner) else curvature.get("kl_clip")
    if graft is not None and kl_clip is not None:
        raise ConfigError(
            f"is {kl_clip!r}, and graft is {graft!r}, which gives each step its length; set kl_clip=None or graft=None",
            path="kl_clip",
        )
    if isinstance(model, Preconditioner):
        if curvature:
            raise ConfigError(f"{', '.join(curvature)} can't be set beside a Preconditioner, which has them")
        return model
    if curvature.get("method", AUTO) == AUTO:
        # Under SGD's lengths, or the Newton step's, a direction of Adam's size is another method's.
        if graft == "adamw":
            curvature["method"] = _own_table(curvature)
            curvature.setdefault("ema_decay", EMA_DECAY)
        else:
            curvature["method"] = ByWidth()
    if graft is not None:
        curvature["kl_clip"] = None
    return Preconditioner(model, **curvature)


def _own_table(curvature: Curvature) -> ByWidth:
    """Returns what "auto" is under AdamW's graft; periods that were given hold for all blocks.

    A wide layer's factors are nearly all that travels, and its bases follow the run's inverse period (decision 34).
    """
    given = curvature.keys() & {"factor_period", "inverse_period"}
    return ByWidth(dense=EkfacAdam(basis_period=None if given else BASIS_PERIOD), wide=EkfacAdam())
