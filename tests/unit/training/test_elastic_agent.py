"""A group of fewer nodes than torchrun was asked for is refused."""

import pytest

from kfdist.training.elastic_agent import missing_nodes

ONE = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1"}
RUN = ["-m", "kfdist", "worker", "run.toml"]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--nnodes", "2", *RUN], ONE),
        (["--nnodes=2:4", *RUN], ONE),
        (["--nproc-per-node=2", *RUN], {**ONE, "PET_NNODES": "2"}),
        (["--nnodes", "3", *RUN], {**ONE, "GROUP_WORLD_SIZE": "2"}),
    ],
)
def test_missing_nodes_are_told_of(arguments: list[str], environment: dict[str, str]):
    told = missing_nodes(["python", "-m", "torch.distributed.run", *arguments], environment)
    assert f"made a group of {environment['GROUP_WORLD_SIZE']}: it takes nodes for dead whose clocks are" in told


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--nnodes", "2", *RUN], {**ONE, "GROUP_WORLD_SIZE": "2"}),
        (["--nnodes", "1:2", *RUN], ONE),
        (["--standalone", *RUN], ONE),
        (["--nnodes", "$NODES", *RUN], ONE),
        ([*RUN, "--nnodes", "2"], ONE),
        (["--nnodes", "2", *RUN], {"GROUP_WORLD_SIZE": "1"}),
        (["--nnodes"], ONE),
    ],
)
def test_groups_that_are_whole_or_that_nobody_knows_of(arguments: list[str], environment: dict[str, str]):
    assert missing_nodes(["torchrun", *arguments], environment) == ""
