"""What ranks do together: all get the result, or all get the error."""

from collections.abc import Callable
from typing import Any

import pytest

from kfdist.comm.communicator import Communicator
from kfdist.comm.together import on_every_rank, on_rank_zero, require_equal
from kfdist.errors import CheckpointError, ConfigError, EnvironmentFault, KfdistError, RankFailed
from tests.support.ranks import run_ranks


def told(communicator: Communicator, work: Callable[[], Any], *, by_all: bool) -> tuple[Any, str, str]:
    """Returns the result, or the error's kind and message."""
    try:
        return (on_every_rank if by_all else on_rank_zero)(communicator, work), "", ""
    except KfdistError as error:
        return getattr(error, "path", None), type(error).__name__, str(error)


def fail(error: Exception) -> None:
    raise error


def rounds(communicator: Communicator) -> list[Any]:
    rank = communicator.rank
    return [
        told(communicator, lambda: {"from": rank}, by_all=False),
        told(communicator, lambda: fail(ConfigError("is 3; give 4", path="a.b")), by_all=False),
        told(communicator, lambda: fail(EnvironmentFault("no room")), by_all=False),
        told(communicator, lambda: fail(ValueError("seven")), by_all=False),
        told(communicator, lambda: rank * 10, by_all=True),
        told(communicator, lambda: fail(CheckpointError("torn")) if rank == 1 else rank, by_all=True),
        told(communicator, lambda: fail(KeyError("x")) if rank else rank, by_all=True),
        told(communicator, lambda: "still in step", by_all=True),
    ]


def test_all_ranks_hear_the_same():
    results = run_ranks(3, rounds)
    assert results[0] == results[1] == results[2]
    assert results[0] == [
        ({"from": 0}, "", ""),
        ("a.b", "ConfigError", "a.b: is 3; give 4"),
        (None, "RankFailed", "no room"),
        (None, "RankFailed", "ValueError: seven"),
        ([0, 10, 20], "", ""),
        (None, "RankFailed", "rank 1: torn"),
        (None, "RankFailed", "rank 1: KeyError: 'x'; rank 2: KeyError: 'x'"),
        (["still in step"] * 3, "", ""),
    ]


def compare(communicator: Communicator) -> str:
    require_equal(communicator, {"lag": 3, "seed": [1, 2]}, lambda name, listed: AssertionError(name))  # type: ignore
    with pytest.raises(ConfigError) as caught:
        own = {"lag": 3, "seed": communicator.rank // 2, "fisher": communicator.rank}
        require_equal(communicator, own, lambda name, listed: ConfigError(f"different {name}: {listed}"))
    return str(caught.value)


def test_values_that_differ_are_listed():
    assert run_ranks(3, compare) == ["different seed: rank 0: 0; rank 1: 0; rank 2: 1"] * 3


@pytest.mark.parametrize(
    "error", [ConfigError("is 3; give 4", path="a.b"), EnvironmentFault("no room"), OSError("full")]
)
def test_a_world_of_one_raises_what_it_found(error: Exception):
    alone = Communicator(None)
    with pytest.raises(ConfigError if isinstance(error, ConfigError) else RankFailed) as caught:
        on_rank_zero(alone, lambda: fail(error))
    assert str(caught.value) == str(error)
    with pytest.raises(RankFailed, match=f"^rank 0: {error}$") as failed:
        on_every_rank(alone, lambda: fail(error))
    assert failed.value.__cause__ is error
    assert on_every_rank(alone, lambda: 3) == [3]
