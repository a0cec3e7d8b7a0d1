"""What a run demands of whoever inverts for it, before anything is contacted."""

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
