r"""The Hessian of torch's losses in the model's output, as outer products of vectors that a backward can start from.

For output o and loss h let H = d^2 h / do^2, and m be what `divisor` returns. `sampled_root` draws u with E[u u^T] / m
= H, and `enumerated_roots` gives all u with (sum of u u^T) / m = H between outputs of the same example (H is
block-diagonal). In both cases J^T H J is the generalised Gauss-Newton matrix, and the Fisher matrix of the model's own
predictive distribution (Martens & Grosse 2015, section 5; algorithms.md 0.4):

    cross_entropy           per term w (diag(p) - p p^T) = sum_c w p_c (p - e_c)(p - e_c)^T,  y ~ p gives u = p - e_y
    binary_cross_entropy    per element w s (1 - s),                                          y ~ s gives u = s - y
    mse                     per element 2,                                                    u = sqrt(2) e, e ~ N(0, 1)

with p = softmax(o), s = sigmoid(o). w is what weights make of the term's target, 1 otherwise: label smoothing alone
moves the target, in which cross-entropy is linear, and so not the Hessian. An ignored target has w = 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfdist import checks
from kfdist.errors import ConfigError
from kfdist.linalg.uploads import sent

LOSSES = ("cross_entropy", "mse", "binary_cross_entropy")


@dataclass(frozen=True, kw_only=True)
class OutputLoss:
    """A loss of `torch.nn.functional` with its arguments; `binary_cross_entropy` is the one with logits.

    Attributes:
        name: One of `LOSSES`.
        target: As torch takes it; needed for `ignore_index` and weights alone.
        label_smoothing: In [0, 1]; cross-entropy only.
        ignore_index: Targets that contribute nothing and don't count in the mean; cross-entropy only.
        reduction: "mean" or "sum".
        weight: Of the classes `[C]` (cross-entropy) or of the elements (binary cross-entropy).
        pos_weight: Of positive targets; binary cross-entropy only.
    """

    name: str
    target: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    weight: Tensor | None = None
    pos_weight: Tensor | None = None

    def __post_init__(self) -> None:
        checks.choice("loss", self.name, LOSSES)
        checks.choice("reduction", self.reduction, ("mean", "sum"))
        checks.number("label_smoothing", self.label_smoothing, least=0, most=1)
        if self.label_smoothing and self.name != "cross_entropy":
            raise ConfigError(f"label_smoothing belongs to cross_entropy, not to {self.name}; leave it out")
        if self.weight is not None and self.name == "mse":
            raise ConfigError("weights of mse aren't covered; leave them out, or use the empirical Fisher")
        if self.pos_weight is not None and self.name != "binary_cross_entropy":
            raise ConfigError(f"pos_weight belongs to binary_cross_entropy, not to {self.name}; leave it out")
        needs_target = self.pos_weight is not None or (self.weight is not None and self.name == "cross_entropy")
        if needs_target and self.target is None:
            raise ConfigError(f"the Hessian of {self.name} with class weights depends on the targets; give target=")


def divisor(output: Tensor, loss: OutputLoss) -> Tensor | float:
    """Returns what torch's reduction divides by; a scalar on the device where it depends on the targets' values."""
    if loss.reduction == "sum":
        return 1.0
    if loss.name != "cross_entropy":
        return float(output.numel())
    terms, hard = _classes_last(output).shape[:-1].numel(), _hard_target(output, loss)
    if hard is None:
        return float(terms)
    counted = _target_weights(hard, loss, _work(output))
    # Where every target is ignored torch's own mean is NaN; here such a batch contributes zero.
    total = counted.sum()
    return torch.where(total == 0, torch.ones_like(total), total)


def counted_terms(output: Tensor, loss: OutputLoss) -> Tensor | None:
    """Returns which terms of a cross-entropy aren't ignored, as its target lies, `[N, T]` or one after another.

    None where all are, or where the target has no such form.
    """
    target = loss.target
    if loss.name != "cross_entropy" or target is None or target.is_floating_point() or target.dim() not in (1, 2):
        return None
    return (target != loss.ignore_index).to(output.device)


def sampled_root(output: Tensor, loss: OutputLoss, generator: torch.Generator) -> Tensor:
    """Draws a target for every term from the model's own predictive distribution, without a host sync.

    Args:
        output: Logits `[N, C]`, `[N, C, d1, ...]` or `[C]` for cross-entropy, any shape for the others.
        loss: Which one.
        generator: On the CPU; the draw is in float64, so that devices draw alike.

    Returns:
        u, shaped and typed like `output`.

    Raises:
        ConfigError: A target or weight that doesn't fit the output.
    """
    work = _work(output)
    if loss.name == "mse":
        return (2**0.5 * _drawn(torch.randn, work.shape, generator, work)).to(output.dtype)
    if loss.name == "binary_cross_entropy":
        probability = torch.sigmoid(work)
        labels = (_drawn(torch.rand, work.shape, generator, work) < probability).to(work.dtype)
        return (_elements(work, loss).sqrt() * (probability - labels)).to(output.dtype)
    p = torch.softmax(_classes_last(work), dim=-1)
    cumulated = p.cumsum(-1)
    threshold = _drawn(torch.rand, (*p.shape[:-1], 1), generator, work) * cumulated[..., -1:]
    labels = (cumulated <= threshold).sum(-1, keepdim=True).clamp_(max=p.shape[-1] - 1)
    u = p.scatter_add(-1, labels, torch.full_like(threshold, -1.0))
    u = u * _terms(output, loss).sqrt().unsqueeze(-1)
    return _classes_back(u, output).to(output.dtype)


def enumerated_roots(output: Tensor, loss: OutputLoss, examples: int) -> Iterator[Tensor]:
    """Goes through every target of every term, each by the root of its probability.

    Terms of one example aren't independent of each other once they have gone back through the model, so each has a
    backward of its own; those of different examples share theirs. There are C for one term per example, C times the
    terms otherwise.

    Args:
        output: As for `sampled_root`.
        loss: Which one.
        examples: How many independent examples the output has, along dim 0.

    Yields:
        u, shaped and typed like `output`.

    Raises:
        ConfigError: A target or weight that doesn't fit the output.
    """
    work = _work(output)
    if loss.name != "cross_entropy":
        if loss.name == "mse":
            root = torch.full_like(work, 2**0.5)
        else:
            probability = torch.sigmoid(work)
            root = (_elements(work, loss) * probability * (1 - probability)).sqrt()
        flat = root.reshape(examples, -1)
        for element in range(flat.shape[1]):
            u = torch.zeros_like(flat)
            u[:, element] = flat[:, element]
            yield u.reshape(output.shape).to(output.dtype)
        return
    p = torch.softmax(_classes_last(work), dim=-1)
    examples = examples if output.dim() > 1 else 1
    flat, weights = p.reshape(examples, -1, p.shape[-1]), _terms(output, loss).reshape(examples, -1, 1)
    for term in range(flat.shape[1]):
        for label in range(flat.shape[2]):
            u = torch.zeros_like(flat)
            u[:, term] = flat[:, term]
            u[:, term, label] -= 1.0
            u[:, term] *= (flat[:, term, label, None] * weights[:, term]).sqrt()
            yield _classes_back(u.reshape(p.shape), output).to(output.dtype)


def _work(output: Tensor) -> Tensor:
    detached = output.detach()
    return detached.to(torch.promote_types(detached.dtype, torch.float32))


def _drawn(draw: Callable[..., Tensor], shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    drawn = draw(shape, generator=generator, dtype=torch.float64, device="cpu")
    return sent(drawn.to(like.dtype), like.device)


def _classes_last(logits: Tensor) -> Tensor:
    return logits if logits.dim() <= 1 else logits.movedim(1, -1)


def _classes_back(logits: Tensor, like: Tensor) -> Tensor:
    return logits if like.dim() <= 1 else logits.movedim(-1, 1)


def _hard_target(output: Tensor, loss: OutputLoss) -> Tensor | None:
    """Returns class indices, or None where the target is absent or gives probabilities."""
    target = loss.target
    if target is None or target.is_floating_point():
        return None
    expected = _classes_last(output).shape[:-1]
    if target.shape != expected:
        raise ConfigError(
            f"target has shape {tuple(target.shape)}, must be {tuple(expected)} for logits {tuple(output.shape)}"
        )
    return target.to(output.device)


def _target_weights(target: Tensor, loss: OutputLoss, like: Tensor) -> Tensor:
    """Returns each term's share of torch's mean: the weight of its class, 0 if ignored."""
    valid = (target != loss.ignore_index).to(like.dtype)
    if loss.weight is None:
        return valid
    return valid * _class_weights(loss.weight, like)[target * valid.to(target.dtype)]


def _class_weights(weight: Tensor, like: Tensor) -> Tensor:
    return weight.detach().to(like.device, like.dtype)


def _terms(output: Tensor, loss: OutputLoss) -> Tensor:
    """Returns w of each term of cross-entropy: sum_c weight_c q_c for the smoothed target distribution q."""
    work, epsilon = _work(output), loss.label_smoothing
    last = _classes_last(work)
    hard = _hard_target(output, loss)
    if hard is not None:
        of_target = _target_weights(hard, loss, work)
        if loss.weight is None:
            return of_target
        mean = _class_weights(loss.weight, work).mean()
        return (1 - epsilon) * of_target + epsilon * mean * (hard != loss.ignore_index).to(work.dtype)
    if loss.target is None:
        return last.new_ones(last.shape[:-1])
    if loss.target.shape != output.shape:
        raise ConfigError(
            f"target has shape {tuple(loss.target.shape)}, must be that of the logits, {tuple(output.shape)}"
        )
    q = _classes_last(loss.target.detach().to(work.device, work.dtype)) * (1 - epsilon) + epsilon / last.shape[-1]
    return q.sum(-1) if loss.weight is None else (q * _class_weights(loss.weight, work)).sum(-1)


def _elements(work: Tensor, loss: OutputLoss) -> Tensor:
    """Returns w of each element of binary cross-entropy: its weight, times pos_weight where the target is 1."""
    w = torch.ones_like(work)
    if loss.weight is not None:
        w = w * _class_weights(loss.weight, work)
    if loss.pos_weight is not None:
        assert loss.target is not None, "OutputLoss asks for it"
        if loss.target.shape != work.shape:
            raise ConfigError(f"target has shape {tuple(loss.target.shape)}, must be {tuple(work.shape)}")
        target = loss.target.detach().to(work.device, work.dtype)
        w = w * (1 + (_class_weights(loss.pos_weight, work) - 1) * target)
    return w
