"""KFC's invariance to re-parametrisation, in training (arXiv 1602.01407; algorithms.md 2.6, C5; claim d).

The same small convolutional network is trained on the digits in several coordinates: raw pixels, centred and scaled
pixels, and with logistic hidden units, (1 + tanh z)/2, in place of tanh z. In each, the initial parameters are
transformed so that the function is the same at step 0; batches and learning rate are the same. Convolutions have no
padding: padded zeros would not move with the pixels. One number per channel is subtracted, since that is what a
convolution's bias can undo; a mean image is no such change.

KFC's step in the function is the same in all coordinates if there is no damping and the factors have full rank. Hence
tanh and not relu, whose units may be silent on a batch, and more examples in a batch than the linear layer has inputs:
what a step does outside the span of the rows depends on the coordinates. Damping lambda I is in the parameters'
coordinates, so how far the trajectories part is measured for a row of lambdas.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfdist.bench.claims import ClaimResult, Part
from kfdist.curvature.inverters import make_inverter
from kfdist.data.sets import Digits
from kfdist.policies.staleness import FixedLag
from kfdist.runtime.preconditioner import Preconditioner

TITLE = "KFC's training doesn't depend on the parametrisation, such as centred or raw inputs; SGD's does (1602.01407)"
SAME_LIMIT = 1e-3
DIFFERENT_LIMIT = 5e-2

LEARNING_RATE, KL_CLIP = 0.1, 1e-3
SGD_LEARNING_RATE = 0.1
CHANNELS = (8, 16)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the experiment.

    Attributes:
        steps: Steps of training.
        batch: Examples a step.
        dampings: lambda, falling; the verdict is about the last.
        examples: Of the test set, on which the functions are compared.
    """

    steps: int = 40
    batch: int = 256
    dampings: tuple[float, ...] = (1e-2, 1e-4, 1e-8, 1e-12, 1e-14)
    examples: int = 256


QUICK = Settings(steps=3, batch=96, dampings=(1e-14,), examples=32)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """An affine change of the inputs, and of every hidden activation, that the parameters undo.

    Attributes:
        mean: Subtracted from every pixel.
        scale: The pixels are divided by it then.
        gain: c of the activation c tanh(z) + s.
        shift: s.
    """

    mean: float = 0.0
    scale: float = 1.0
    gain: float = 1.0
    shift: float = 0.0


class Convnet(nn.Module):
    """Two convolutions without padding, mean pooling and a linear layer, in given coordinates, in float64."""

    def __init__(self, coordinates: Coordinates, seed: int) -> None:
        super().__init__()
        first, second = CHANNELS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(
                [nn.Conv2d(1, first, 3), nn.Conv2d(first, second, 3), nn.Linear(second * 4, 10)]
            ).double()
        self._coordinates = coordinates
        before = (coordinates.mean, coordinates.scale)
        with torch.no_grad():
            for layer in self.layers:
                _undo(layer, *before)
                # x' = c x + s = (x - mean)/scale
                before = (-coordinates.shift / coordinates.gain, 1.0 / coordinates.gain)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits of raw images `[N, 1, 8, 8]`."""
        c = self._coordinates
        h = (images - c.mean) / c.scale
        for convolution in self.layers[:2]:
            h = c.gain * convolution(h).tanh() + c.shift
        return self.layers[2](F.avg_pool2d(h, 2).flatten(1))


def _undo(layer: nn.Module, mean: float, scale: float) -> None:
    """Changes a layer so that it makes of (x - mean)/scale what it made of x."""
    assert isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None
    layer.bias.add_(mean * layer.weight.flatten(1).sum(1))
    layer.weight.mul_(scale)


def measure_reparametrisation(quick: bool = False) -> ClaimResult:
    """Measures claim d.

    Two trajectories differ by d = max over steps of ||f - f'|| / ||f - f_0||, f the log-probabilities on test images
    and f_0 those of step 0. The rule, fixed before the measurement: shown if
    - all coordinates begin with the same function, to 1e-12 of its size;
    - with KFC at the smallest damping, d <= 1e-3 in all coordinates;
    - with SGD, d >= 0.05 in all coordinates, and at least a hundred times KFC's.

    Args:
        quick: Few steps, which take about a second and say little.
    """
    settings = QUICK if quick else Settings()
    data = Digits().load()
    mean, scale = float(data.train.inputs.mean()), float(data.train.inputs.std())
    changed = {
        "centred inputs": Coordinates(mean=mean),
        "centred and scaled inputs, logistic units": Coordinates(mean=mean, scale=scale, gain=0.5, shift=0.5),
    }
    paths: dict[str, dict[str, Path]] = {}
    for name, damping in [("sgd", None), *((f"kfc, damping {each:g}", each) for each in settings.dampings)]:
        paths[name] = {each: _train(at, damping, settings) for each, at in {"raw": Coordinates(), **changed}.items()}
    differences = {
        name: {each: _difference(runs["raw"], runs[each]) for each in changed} for name, runs in paths.items()
    }
    start = paths["sgd"]["raw"].outputs[0]
    unequal = max(
        float((runs[each].outputs[0] - start).norm() / start.norm()) for runs in paths.values() for each in runs
    )
    last = f"kfc, damping {settings.dampings[-1]:g}"
    return ClaimResult(
        claim="d",
        title=TITLE,
        parts=judge_trajectories(
            unequal, worst_kfc=max(differences[last].values()), least_sgd=min(differences["sgd"].values()), last=last
        ),
        figures={
            "difference_at_start": unequal,
            "difference_by_method": differences,
            "loss": {
                name: {each: [run.losses[0], run.losses[-1]] for each, run in runs.items()}
                for name, runs in paths.items()
            },
        },
        conditions={
            "network": f"conv 3x3 without padding to {CHANNELS[0]} and {CHANNELS[1]} channels, tanh, mean pool, linear",
            "data": "digits",
            "coordinates": {each: vars(at) for each, at in changed.items()},
            "steps": settings.steps,
            "batch": settings.batch,
            "dtype": "float64",
            "kfc": "kfac-eigen, common damping, inverted at every step, empirical Fisher, "
            f"learning rate {LEARNING_RATE}, KL clip {KL_CLIP}",
            "sgd": f"learning rate {SGD_LEARNING_RATE}, no momentum",
            "compared_on": f"{settings.examples} test images",
        },
    )


@dataclass(frozen=True, kw_only=True)
class Path:
    """What one run did.

    Attributes:
        outputs: Log-probabilities of the test images, before the first step and after every one.
        losses: Of the batches.
    """

    outputs: list[Tensor]
    losses: list[float]


def _train(coordinates: Coordinates, damping: float | None, settings: Settings) -> Path:
    """Trains with KFC, or with plain SGD where the damping is None."""
    data = Digits().load()
    model = Convnet(coordinates, seed=0)
    lr = SGD_LEARNING_RATE if damping is None else LEARNING_RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(1)
    test = data.test.inputs[: settings.examples].double()
    outputs, losses = [_outputs(model, test)], []
    with ExitStack() as stack:
        if damping is not None:
            kfc = Preconditioner(
                model,
                make_inverter("kfac-eigen"),
                damping=damping,
                factor_period=1,
                inverse_period=1,
                kl_clip=KL_CLIP,
                lr=LEARNING_RATE,
                adoption=FixedLag(0),
            )
            stack.enter_context(kfc).attach(optimizer)
        for _ in range(settings.steps):
            chosen = torch.randint(len(data.train.labels), (settings.batch,), generator=generator)
            loss = F.cross_entropy(model(data.train.inputs[chosen].double()), data.train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            outputs.append(_outputs(model, test))
    return Path(outputs=outputs, losses=losses)


def _outputs(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).log_softmax(-1)


def _difference(one: Path, other: Path) -> float:
    """Returns d of `measure_reparametrisation`."""
    start = one.outputs[0]
    pairs = zip(one.outputs[1:], other.outputs[1:], strict=True)
    return max(float((f - g).norm() / (f - start).norm()) for f, g in pairs)


def judge_trajectories(unequal: float, *, worst_kfc: float, least_sgd: float, last: str) -> tuple[Part, ...]:
    """Applies the rule of `measure_reparametrisation` to the differences at the start, and of the trajectories."""
    return (
        Part(
            statement="all coordinates begin with the same function, to 1e-12",
            holds=unequal <= 1e-12,
            seen=f"relative difference {unequal:.1g}",
        ),
        Part(
            statement=f"{last}: trajectories differ by at most {SAME_LIMIT:g} of how far the function moves",
            holds=worst_kfc <= SAME_LIMIT,
            seen=f"at most {worst_kfc:.2g}",
        ),
        Part(
            statement=f"SGD's differ by at least {DIFFERENT_LIMIT:g}, and a hundred times KFC's",
            holds=least_sgd >= max(DIFFERENT_LIMIT, 100 * worst_kfc),
            seen=f"at least {least_sgd:.2g}",
        ),
    )
