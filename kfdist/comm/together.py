"""What ranks do together: all get the result or all get the error, and none is left waiting in a collective."""

from collections.abc import Callable, Mapping
from typing import Any

from kfdist.comm.communicator import Communicator
from kfdist.errors import ConfigError, KfdistError, RankFailed


def on_rank_zero(communicator: Communicator, work: Callable[[], Any]) -> Any:
    """Does `work` on rank 0 and returns its result on all ranks, or raises its error on all.

    Args:
        communicator: The ranks; all must call this.
        work: Returns something JSON can say.

    Raises:
        ConfigError: Rank 0 raised one, with the same path.
        RankFailed: Rank 0 raised anything else.
    """
    outcome: dict[str, Any] | None = None
    if communicator.rank == 0:
        try:
            outcome = {"result": work()}
        except ConfigError as error:
            outcome = {"message": error.message, "path": error.path}
        except Exception as error:  # whatever it is: the other ranks wait to hear of it
            outcome = {"message": _reason(error), "path": None}
    outcome = communicator.broadcast_json(outcome)
    assert outcome is not None
    if "result" in outcome:
        return outcome["result"]
    if outcome["path"] is None:
        raise RankFailed(outcome["message"])
    raise ConfigError(outcome["message"], path=outcome["path"])


def on_every_rank(communicator: Communicator, work: Callable[[], Any]) -> list[Any]:
    """Does `work` on every rank and returns all ranks' results, in rank order, on each of them.

    Args:
        communicator: The ranks; all must call this.
        work: Returns something JSON can say.

    Raises:
        RankFailed: Some rank raised an error; names every such rank and its reason, and is raised on all.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:  # whatever it is: the other ranks wait to hear of it
        failure = error
    outcomes = communicator.all_gather_json([result, None if failure is None else _reason(failure)])
    failed = [f"rank {rank}: {reason}" for rank, (_, reason) in enumerate(outcomes) if reason is not None]
    if failed:
        raise RankFailed("; ".join(failed)) from failure
    return [result for result, _ in outcomes]


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
