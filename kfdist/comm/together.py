"""What ranks do together: all get the result or all get the error, and none is left waiting in a collective."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from kfdist.comm.communicator import Communicator
from kfdist.errors import ConfigError, KfdistError, RankFailed


def on_rank_zero(communicator: Communicator, work: Callable[[], Any]) -> Any:
    """Does `work` on rank 0 and returns its result on all ranks, or raises its error on all; as `on_ranks`."""
    return on_ranks(communicator, (0,), work)[0]


def on_ranks(communicator: Communicator, ranks: Collection[int], work: Callable[[], Any]) -> dict[int, Any]:
    """Does `work` on some ranks and returns their results, by rank, on all; or raises the first one's error on all.

    Args:
        communicator: The ranks; all must call this, with the same `ranks`.
        ranks: Those that work.
        work: Returns something JSON can say.

    Raises:
        ConfigError: The first rank that failed raised one, with the same path.
        RankFailed: It raised anything else.
    """
    outcome: dict[str, Any] | None = None
    if communicator.rank in ranks:
        try:
            outcome = {"result": work()}
        except ConfigError as error:
            outcome = {"message": error.message, "path": error.path}
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            outcome = {"message": _reason(error), "path": None}
    outcomes = {rank: each for rank, each in enumerate(communicator.all_gather_json(outcome)) if each is not None}
    for rank, each in outcomes.items():
        if "result" not in each:
            message = each["message"] if len(ranks) == 1 else f"rank {rank}: {each['message']}"
            if each["path"] is None:
                raise RankFailed(message)
            raise ConfigError(message, path=each["path"])
    return {rank: each["result"] for rank, each in outcomes.items()}


def on_every_rank(communicator: Communicator, work: Callable[[], Any]) -> list[Any]:
    """Does `work` on every rank and returns all ranks' results, in rank order, on each of them.

    Args:
        communicator: The ranks; all must call this.
        work: Returns something JSON can say.

    Raises:
        RankFailed: Some rank raised an error; names every such rank and its reason, and is raised on all.
    """
    outcomes, failure = attempts_of_every_rank(communicator, work)
    failed = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason is not None]
    if failed:
        raise RankFailed("; ".join(failed)) from failure
    return [result for result, _ in outcomes]


def attempts_of_every_rank(
    communicator: Communicator, work: Callable[[], Any]
) -> tuple[list[tuple[Any, str | None]], Exception | None]:
    """Does `work` on every rank; returns, in rank order, each one's result or why there is none, and the own error.

    Args:
        communicator: The ranks; all must call this.
        work: Returns something JSON can say.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is: the other ranks wait to hear of it
        failure = error
    outcomes = communicator.all_gather_json([result, None if failure is None else _reason(failure)])
    return [(result, reason) for result, reason in outcomes], failure


def require_equal(
    communicator: Communicator, own: Mapping[str, Any], complaint: Callable[[str, str], KfdistError]
) -> None:
    """Refuses ranks whose values differ, on all of them.

    Args:
        communicator: The ranks; all must call this, with the same names.
        own: This rank's values by name, anything JSON can say.
        complaint: Makes the error of a name and of the values that ranks have for it, such as "rank 0: 1; rank 3: 2".

    Raises:
        KfdistError: What `complaint` returns for the first name whose values differ.
    """
    everyone = communicator.all_gather_json(dict(own))
    for name in own:
        values = [of_rank.get(name) for of_rank in everyone]
        if any(value != values[0] for value in values):
            raise complaint(name, "; ".join(f"rank {rank}: {value}" for rank, value in enumerate(values)))


def _reason(error: Exception) -> str:
    """Returns the message of an error that was raised on purpose, or comes from the system; else its type, too."""
    return str(error) if isinstance(error, KfdistError | OSError) else f"{type(error).__name__}: {error}"
