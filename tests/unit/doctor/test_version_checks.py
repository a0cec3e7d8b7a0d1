"""Versions: what is missing, too old, or other than what the tests run on."""

from pathlib import Path

from packaging.requirements import Requirement

from kfdist.config import load_config
from kfdist.doctor.finding import Verdict
from kfdist.doctor.version_checks import (
    TESTED,
    check_packages,
    check_python,
    check_versions,
    check_vision,
    requirements,
)
from tests.support.sources import ROOT


def test_here_nothing_is_wrong() -> None:
    found = check_versions(load_config(None, environment={}))
    assert [finding for finding in found if finding.verdict is Verdict.FAILED] == []


def test_a_python_that_is_too_old_fails() -> None:
    assert check_python("3.10.4", ">=3.11").verdict is Verdict.FAILED
    assert check_python("3.13.0", ">=3.11").verdict is Verdict.OK


def test_a_package_that_is_missing_or_too_old_fails_and_one_that_is_new_is_warned_of() -> None:
    wanted = [Requirement("ray[default]>=2.50"), Requirement("torch>=2.9"), Requirement("grpcio>=1.85.1,<2")]
    there = {"torch": "2.8.1", "grpcio": "1.99.0", "protobuf": TESTED["protobuf"]}
    found = {finding.check: finding for finding in check_packages(wanted, there)}
    assert {name: finding.verdict for name, finding in found.items()} == {
        "ray": Verdict.FAILED,
        "torch": Verdict.FAILED,
        "grpcio": Verdict.WARNING,
        "protobuf": Verdict.OK,
    }
    assert found["ray"].mend == 'pip install "ray[default]>=2.50"'
    assert "kfdist needs >=2.9" in found["torch"].seen


def test_what_is_said_to_be_tested_is_what_the_tests_run_on() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name.replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    assert {name: pinned[name] for name in TESTED} == TESTED
    assert {"torch", "ray", "grpcio"} <= {each.name for each in requirements()}


def test_torchvision_is_needed_by_some_runs_alone() -> None:
    images = load_config(Path("imagenet-resnet50"), environment={})
    (missing,) = check_vision(images, {})
    assert missing.verdict is Verdict.FAILED
    assert "model.name = 'torchvision' and data.name = 'image-folder' need it" in missing.seen
    assert [each.verdict for each in check_vision(images, {"torchvision": "0.28.0"})] == [Verdict.OK]
    assert check_vision(load_config(None, environment={}), {}) == []
