"""What a step launches to apply inverses, counted by the operations that it dispatches."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

import kfdist
from tests.support.kernel_launches import Launches

WIDTH, RANK = 24, 4
"""Of both factors so few pairs are kept that none is applied as a matrix: the most products that a block takes."""


def launched(device: torch.device, layers: list[nn.Module]) -> Counter[str]:
    """Returns what the last of some steps launches in the application; nothing is due at it."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).to(device)
    inverter = kfdist.RsKfac(rank=RANK, oversampling=2, direction_error=0)
    given = {"factor_period": 8, "inverse_period": 8, "adoption": kfdist.FixedLag(0), "lr": 0.1}
    x = torch.randn(16, WIDTH, device=device)
    with kfdist.Preconditioner(model, inverter, **given) as pre:
        for _ in range(3):
            model.zero_grad()
            model(x).square().sum().backward()
            applying, found = pre.pipeline.applying, Launches()
            gradients, damping = [p.grad for p in model.parameters()], pre.pipeline.in_force.damping
            assert all(each is not None for each in gradients) and damping(pre.next_step) > 0
            apply = applying.apply

            def counted(*arguments: object, apply: Callable[..., None] = apply, found: Launches = found) -> None:
                with found:
                    apply(*arguments)

            object.__setattr__(applying, "apply", counted)
            pre.step()
            object.__delattr__(applying, "apply")
    return found.by_name


@pytest.mark.parametrize(
    ("layer", "most"),
    [
        (lambda: nn.Linear(WIDTH, WIDTH, bias=False), 6),
        (lambda: nn.Linear(WIDTH, WIDTH), 8),
        (lambda: nn.LayerNorm(WIDTH), 9),
    ],
    ids=["linear", "linear with bias", "norm"],
)
def test_what_a_block_more_launches(device: torch.device, layer: Callable[[], nn.Module], most: int):
    few, many = launched(device, [layer() for _ in range(3)]), launched(device, [layer() for _ in range(5)])
    more = {name: (many[name] - few[name]) / 2 for name in many if many[name] > few[name]}
    print(more, few)
    assert sum(more.values()) <= most, more
