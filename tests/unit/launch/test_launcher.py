"""What `kfdist train` checks before it starts anything."""

import datetime
import shutil
from pathlib import Path

import pytest

from kfdist.config import load_config
from kfdist.errors import EnvironmentFault
from kfdist.launch.launcher import train
from kfdist.launch.terminal import StopRequests, Terminal
from kfdist.rpc.certificates import Authority
from kfdist.system.credentials import Role


@pytest.mark.parametrize("role", Role)
def test_a_certificate_that_no_process_could_use_is_found_before_one_is_started(
    certificates: Path, tmp_path: Path, role: Role
):
    directory = shutil.copytree(certificates, tmp_path / "certificates")
    pem = Authority.read(directory).issue(role, valid=datetime.timedelta(days=-1))
    (directory / role.file_name).write_bytes(pem)
    given = [f"run.dir={tmp_path / 'run'}", f"security.certificates={directory}", "control.address=127.0.0.1:0"]
    config = load_config(None, overrides=[*given, "control.metrics_address=127.0.0.1:0"], environment={})
    with pytest.raises(EnvironmentFault, match=rf"{role.value}\.pem expired on .* \(node "):
        train(config, Terminal(as_json=True), StopRequests())
    assert not (tmp_path / "run").exists()
