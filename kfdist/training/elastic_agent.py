"""What torchrun's agent, which started this rank, was asked for, and whether that is what it made."""

import os
from collections.abc import Mapping, Sequence

from kfdist.errors import EnvironmentFault
from kfdist.system.processes import command_line

_NODES = "--nnodes"


def check_nodes() -> None:
    """Refuses a group of fewer nodes than torchrun was asked for.

    Its agents take a node for dead whose clock is 15 s behind theirs (torch 2.13), and form a group without it, be
    `--nnodes` what it may: the run would go on with a part of its batch, and nobody would say so.

    Raises:
        EnvironmentFault: Nodes are missing.
    """
    arguments = [os.fsdecode(argument) for argument in command_line(os.getppid()).split(b"\0")]
    if missing := missing_nodes(arguments, os.environ):
        raise EnvironmentFault(missing)


def missing_nodes(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """Says that nodes are missing; empty if none are, or nobody knows.

    Args:
        arguments: Of the agent.
        environment: Of one of its ranks.
    """
    there = environment.get("GROUP_WORLD_SIZE", "")
    if "TORCHELASTIC_RUN_ID" not in environment or not there.isdecimal():
        return ""
    least = _nodes(arguments, environment).partition(":")[0]
    if not least.isdecimal() or int(least) <= int(there):
        return ""
    return (
        f"torchrun was asked for {least} nodes and made a group of {there}: it takes nodes for dead whose clocks are "
        "15 s behind; set the clocks of all nodes right (`kfdist doctor` on each says whether they are synchronised)"
    )


def _nodes(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, given = option.partition("=")
        if name == _NODES:
            return given or value
        if option == "kfdist":
            break  # what follows is ours
    return environment.get("PET_NNODES", "")
