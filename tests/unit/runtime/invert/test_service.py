"""What a run demands of whoever inverts for it, before anything is contacted."""

import time

import pytest
import torch

import kfdist
from kfdist.errors import ConfigError, EnvironmentFault
from tests.support.preconditioning import preconditioner, two_layers


def test_owners_invert_on_known_devices_only():
    with pytest.raises(ConfigError, match="^device: 'tpu' is not allowed; choose one of 'cpu', 'cuda'"):
        kfdist.connect("127.0.0.1:7070", device="tpu")


def test_with_a_fixed_lag_a_rank_without_a_gpu_cant_say_which_owners_it_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match=r"owners must compute what this rank would.*cluster\.bundle\.gpus = 0"):
        preconditioner(two_layers(), link=kfdist.connect("127.0.0.1:7070", device="cuda"))


@pytest.mark.parametrize("epoch", [0, 2**62])
def test_a_start_has_a_number_that_the_controller_takes(epoch: int):
    with pytest.raises(ConfigError, match=f"^epoch: {epoch} is not allowed; .*draws one from rank 0's clock"):
        kfdist.connect("127.0.0.1:7070", epoch=epoch)
    assert kfdist.connect("127.0.0.1:7070", epoch=int(time.time() * 1000)).epoch
