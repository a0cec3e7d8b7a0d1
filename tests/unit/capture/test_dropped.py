"""A capture that nobody has any more ends, also between a forward and its backward."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD

import kfdist
from kfdist.types import Fisher
from tests.support.factors import armed_capture
from tests.support.small_models import images, small_cnn


def hooks() -> tuple[int, int]:
    gc.collect()
    of_modules = torch.nn.modules.module
    return len(of_modules._global_forward_hooks), len(of_modules._global_forward_pre_hooks)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "exact"])
@pytest.mark.parametrize("observed", [True, False])
def test_a_graph_does_not_hold_it(fisher: Fisher, observed: bool) -> None:
    before = hooks()
    model = small_cnn()
    capture = armed_capture(model, fisher=fisher)
    logits = model(images(4)[0])
    if observed:
        capture.observe(logits, "cross_entropy")
    loss = nn.functional.cross_entropy(logits, images(4)[1])
    assert hooks() != before
    gone = weakref.ref(capture)
    del capture
    assert hooks() == before
    assert gone() is None
    loss.backward()  # the hooks of the graph find nobody
    assert all(each.grad is not None for each in model.parameters())


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_preconditioner_that_was_not_closed_goes_with_its_hooks(fisher: Fisher) -> None:
    before = hooks()
    model = small_cnn()
    preconditioner = kfdist.Preconditioner(model, "kfac", fisher=fisher, lr=0.1)
    preconditioner.attach(SGD(model.parameters(), lr=0.1))
    logits = model(images(4)[0])
    preconditioner.observe(logits, "cross_entropy")
    assert hooks() != before
    gone = weakref.ref(preconditioner)
    del preconditioner, logits
    assert hooks() == before
    assert gone() is None
