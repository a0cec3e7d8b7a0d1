"""torch.compile changes neither the statistics nor the names."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from kfdist.capture.capture import Capture
from kfdist.capture.requests import Request, Sampling
from kfdist.runtime.plan.layers import bare_model
from kfdist.runtime.plan.planner import Plan
from tests.support.factors import Factors, assert_factors_equal, factors_of
from tests.support.plans import planned
from tests.support.small_models import images, small_cnn

SAME = 1e-12
"""float64; a compiled backward may add gradients in another order."""

Compile = Callable[[nn.Module], nn.Module]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def wrapped(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    return compiled


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def only_a_part(model: nn.Module) -> nn.Module:
    assert isinstance(model, nn.Sequential)
    model[2] = wrapped(model[2])
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


def captured(model: nn.Module) -> tuple[Capture, Plan]:
    plan = planned(bare_model(model), "kfac")
    blocks = {block.name: block for group in plan.groups for block in group.blocks}
    capture = Capture(bare_model(model), blocks, sampling=Sampling(), grad_scaler=None)
    capture.arm(dict.fromkeys(blocks, Request()))
    return capture, plan


def measure(compile_: Compile) -> Factors:
    """Two steps, the second with a batch of another length, which recompiles."""
    model = compile_(small_cnn())
    capture, _ = captured(model)
    factors = {}
    for step, n in enumerate((8, 5)):
        x, y = images(n, seed=step)
        for xs, ys in zip(x.split(4), y.split(4), strict=True):
            (nn.functional.cross_entropy(model(xs), ys) / 2).backward()
        factors |= {f"{name}@{step}": each for name, each in factors_of(capture.drain()).items()}
    capture.close()
    return factors


@pytest.mark.parametrize("compile_", [wrapped, in_place, only_a_part])
def test_a_compiled_model_gives_the_same_statistics_under_the_same_names(compile_: Compile):
    assert_factors_equal(measure(compile_), measure(plain), SAME)


def test_coverage_of_a_compiled_model_has_clean_names():
    _, expected = captured(small_cnn())
    _, plan = captured(wrapped(only_a_part(small_cnn())))
    assert plan.coverage == expected.coverage


def test_code_compiled_before_the_capture_was_made_is_measured():
    """Torch doesn't guard on hooks: on steps that measure, compiled code runs eagerly."""
    model = wrapped(small_cnn())
    x, y = images(4)
    nn.functional.cross_entropy(model(x), y).backward()
    capture, _ = captured(model)
    nn.functional.cross_entropy(model(x), y).backward()
    assert set(capture.drain()) == {"0", "2", "5", "7"}


def test_a_compiled_function_around_the_model_is_measured_and_keeps_its_graph_on_other_steps():
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object):
        graphs.append(graph)
        return graph.forward

    model, (x, y) = small_cnn(), images(4)

    @torch.compile(backend=backend, fullgraph=True)
    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), y)

    capture, plan = captured(model)
    due = dict.fromkeys((block.name for block in plan.blocks), Request())
    for step in range(6):
        capture.arm(due if step % 3 == 0 else {})
        loss().backward()
        assert set(capture.drain()) == (set(due) if step % 3 == 0 else set())
    capture.close()
    assert len(graphs) == 1
