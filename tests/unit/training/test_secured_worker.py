"""`kfdist worker` and a controller with TLS and a token."""

from pathlib import Path

import pytest

from kfdist.config import Config, load_config
from kfdist.errors import EnvironmentFault
from kfdist.rpc.certificates import make_certificates
from kfdist.system.credentials import Credentials, Role
from kfdist.training.setup import check_controller
from kfdist.training.worker import configuration_digest, run_worker
from tests.support.controller import ControllerThread


def configured(directory: Path, *overrides: str) -> Config:
    return load_config(None, overrides=[f"run.dir={directory / 'run'}", *overrides], environment={})


def test_a_controller_that_does_not_trust_this_rank_is_found_before_anything_starts(tmp_path: Path, certificates: Path):
    own = Credentials.at(Role.CONTROLLER, str(certificates), None)
    make_certificates(tmp_path / "others")
    with ControllerThread(tmp_path / "c.sqlite", credentials=own) as controller:
        address = f"control.address={controller.address}"
        check_controller(configured(tmp_path, address, f"security.certificates={certificates}"))
        with pytest.raises(EnvironmentFault, match="takes nothing without TLS and a token"):
            run_worker(configured(tmp_path, address))
        with pytest.raises(EnvironmentFault, match="of another authority"):
            run_worker(configured(tmp_path, address, f"security.certificates={tmp_path / 'others'}"))
        ours = f"security.certificates={certificates}"
        other = f"security.token_file={tmp_path / 'others' / 'token'}"
        with pytest.raises(EnvironmentFault, match=f"the controller at {controller.address} refuses the token: give"):
            run_worker(configured(tmp_path, address, ours, other))
        with pytest.raises(EnvironmentFault, match="nothing/token on node .* can't be read"):
            run_worker(configured(tmp_path, address, ours, "security.token_file=nothing/token"))
    assert not (tmp_path / "run").exists()


def test_where_its_certificates_are_is_each_ranks_own_affair(tmp_path: Path):
    digest = configuration_digest(configured(tmp_path))
    assert configuration_digest(configured(tmp_path, "security.certificates=here")) == digest
    assert configuration_digest(configured(tmp_path, "run.seed=77")) != digest
