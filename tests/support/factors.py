"""Kronecker factors by their definition: one example at a time, its own loss, every row written out."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.curvature.averages import BatchStatistics
from kfdist.curvature.blocks import Block, make_blocks

Factors = dict[str, tuple[Tensor, Tensor]]
"""(Omega, Gamma) by layer, each [c, d, d]."""


def blocks_of(model: nn.Module) -> dict[str, Block]:
    """The blocks of all layers that can have one, by name."""
    made = [make_blocks(name, module) for name, module in model.named_modules()]
    return {block.name: block for blocks in made if not isinstance(blocks, str) for block in blocks}


def armed_capture(
    model: nn.Module,
    *,
    names: Iterable[str] | None = None,
    sampling: Sampling | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    seed: int = 0,
    fisher: str = "empirical",
    chains: Sequence[Sequence[str]] = (),
    coarse: Sequence[Sequence[str]] = (),
    **request: Any,
) -> Capture:
    """A capture of all blocks, or of some, armed; further arguments say what is asked of each."""
    blocks = blocks_of(model)
    if names is not None:
        blocks = {name: blocks[name] for name in names}
    capture = Capture(
        model,
        blocks,
        sampling=sampling or Sampling(),
        grad_scaler=grad_scaler,
        fisher=fisher,
        chains=chains,
        coarse=coarse,
    )
    capture.arm(dict.fromkeys(blocks, Request(seed=seed, **request)))
    return capture


def factors_of(drained: Mapping[str, BatchStatistics]) -> Factors:
    """Omega and Gamma of what a capture drained."""

    def mean(total: Tensor, count: float | Tensor) -> Tensor:
        return total / (count.reshape(-1, 1, 1) if isinstance(count, Tensor) else count)

    return {
        name: (mean(sum_of(each, "A"), each.examples), mean(sum_of(each, "G"), each.positions))
        for name, each in drained.items()
    }


def sum_of(batch: BatchStatistics, part: str) -> Tensor:
    """A factor's sum, also where it is drained as rows of full width."""
    if part not in batch.thin:
        return batch.sums[part]
    rows = torch.cat([each.rows for each in batch.thin[part]], dim=1)
    assert all(each.columns is None for each in batch.thin[part])
    return rows.mT @ rows


def factors_by_definition(
    model: nn.Module, examples: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor], names: Iterable[str]
) -> Factors:
    """Computes Omega and Gamma as kfdist/curvature/statistics.py defines them.

    Args:
        model: In training mode; must treat its examples independently.
        examples: One by one.
        loss: An example's own loss, not divided by anything.
        names: The layers.
    """
    omegas, gammas = defaultdict(list), defaultdict(list)
    for of_example in rows_by_definition(model, examples, loss, names):
        for name, (a, g) in of_example.items():
            omegas[name].append(a.mT @ a)
            gammas[name].append(g.mT @ g / g.shape[1])
    return {name: (torch.stack(omegas[name]).mean(0), torch.stack(gammas[name]).mean(0)) for name in omegas}


def rows_by_definition(
    model: nn.Module, examples: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor], names: Iterable[str]
) -> list[Factors]:
    """Computes each example's rows a `[c, T, q]` and g `[c, T, p]`; arguments as in `factors_by_definition`."""
    names, modules, found = list(names), dict(model.named_modules()), []
    for example in examples:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        handles = [modules[name].register_forward_hook(partial(_remember, calls[name])) for name in names]
        loss(model, example).backward()
        for handle in handles:
            handle.remove()
        of_example = {}
        for name, of_layer in calls.items():
            rows = [rows_of(modules[name], a, output.grad) for a, output in of_layer if output.grad is not None]
            if rows:
                of_example[name] = (torch.cat([a for a, _ in rows], dim=1), torch.cat([g for _, g in rows], dim=1))
        found.append(of_example)
    model.zero_grad()
    return found


def _remember(calls: list[tuple[Tensor, Tensor]], _module: nn.Module, args: Any, output: Tensor) -> None:
    output.retain_grad()
    calls.append((args[0].detach().clone(), output))


def rows_of(module: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of one call for one example, [c, T, q] with the homogeneous coordinate last, and [c, T, p]."""
    if isinstance(module, nn.Conv2d):
        c = module.groups
        assert not isinstance(module.padding, str)
        patches = nn.functional.unfold(
            a, module.kernel_size, dilation=module.dilation, padding=module.padding, stride=module.stride
        )  # [1, channels x kernel, T], channels of a group side by side
        a = patches[0].view(c, -1, patches.shape[-1]).mT
        g = g[0].flatten(1).view(c, -1, patches.shape[-1]).mT
    else:
        a, g = a.reshape(1, -1, a.shape[-1]), g.reshape(1, -1, g.shape[-1])
    if module.bias is not None:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    return a, g


def assert_factors_equal(actual: Factors, expected: Factors, tolerance: float) -> None:
    """Fails where a layer is missing or too much, or a factor differs by more than `tolerance` of its largest entry."""
    assert set(actual) == set(expected)
    for name, factors in expected.items():
        for label, mine, truth in zip(("Omega", "Gamma"), actual[name], factors, strict=True):
            torch.testing.assert_close(
                mine,
                truth,
                rtol=0,
                atol=tolerance * float(truth.abs().max()),
                msg=lambda message, where=f"{label} of {name!r}": f"{where}: {message}",
            )
            assert truth.abs().max() > 0, "a reference of zeros would prove nothing"
