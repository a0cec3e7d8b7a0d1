"""What a submitter hands to its job."""

import pytest

from kfdist.config import load_config, to_toml
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.launch.submission import ray_launch
from kfdist.launch.submission.ray_launch import on_cluster
from kfdist.launch.submission.request import VARIABLE, Submission


def of(*overrides: str) -> Submission:
    config = load_config(None, overrides=["run.dir=/data/run", *overrides], environment={})
    return Submission(config=to_toml(config), gpus_per_worker=1, max_failures=-1, storage="s3://bucket/path")


def test_a_submission_arrives_as_it_was_sent(monkeypatch):
    monkeypatch.delenv("KFDIST_SECURITY__CERTIFICATES", raising=False)
    sent = of("run.name=big", "preconditioner.methods={'conv*' = 'kfac'}")
    arrived = Submission.of_this_job(sent.variables())
    assert arrived == sent
    assert to_toml(arrived.configuration()) == sent.config


def test_each_node_says_where_its_certificates_are(monkeypatch):
    monkeypatch.setenv("KFDIST_SECURITY__CERTIFICATES", "/here")
    assert of("security.certificates=/there").configuration().security.certificates == "/here"


@pytest.mark.parametrize("text", [None, "", "[]", '{"config": ""}'])
def test_a_process_outside_a_job_is_refused(text: str | None):
    with pytest.raises(ConfigError, match="start this with `kfdist submit`"):
        Submission.of_this_job({} if text is None else {VARIABLE: text})


def test_without_certificates_a_run_stays_on_loopback():
    config = on_cluster(of("control.address=127.0.0.1:0").configuration(), "192.0.2.9:6379")
    assert config.control.address == "127.0.0.1:0"
    assert (config.cluster.ray, config.cluster.owner_address) == ("192.0.2.9:6379", "loopback")


def test_with_certificates_controller_and_owners_are_reached_from_other_nodes():
    given = of("security.certificates=/there", "control.address=127.0.0.1:7070", "control.metrics_address=[::1]:0")
    config = on_cluster(given.configuration(), "127.0.0.2:6379")
    # What leads to 127.0.0.2 is the loopback interface; on a cluster, its network.
    assert (config.control.address, config.control.metrics_address) == ("127.0.0.1:7070", "127.0.0.1:0")
    assert config.cluster.owner_address == "node"


def test_a_controller_that_is_elsewhere_stays_there():
    given = of("security.certificates=/there", "control.address=control.example:7070")
    assert on_cluster(given.configuration(), "127.0.0.2:6379").control.address == "control.example:7070"


def test_a_job_without_a_cluster_is_refused():
    with pytest.raises(EnvironmentFault, match="RAY_ADDRESS is '', no address of a cluster"):
        on_cluster(of().configuration(), "")


def test_a_cluster_without_the_extra_is_told_which_to_install(monkeypatch):
    monkeypatch.setattr(ray_launch, "find_spec", lambda name: None if name == "pyarrow" else object())
    with pytest.raises(
        EnvironmentFault, match=r"^Ray Train needs pyarrow, which \S+ doesn't have; .*'kfdist\[submit\]'"
    ):
        ray_launch.check_ray_train()
