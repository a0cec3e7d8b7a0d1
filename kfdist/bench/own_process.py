"""Measurements in processes of their own, and what these answer."""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch


def in_own_process(function: Any, *arguments: Any) -> Any:
    """Runs a function on one thread in a new process, and returns what it returns.

    Raises:
        RuntimeError: The process ended without an answer. What the function raises is raised here.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_reporting, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return answer(ours)
    finally:
        process.join()


def answer(connection: Connection) -> Any:
    """Returns what a process sends, and raises it where it is an exception.

    Raises:
        RuntimeError: The process ended without an answer.
    """
    try:
        found = connection.recv()
    except EOFError:
        raise RuntimeError("a process of the measurement ended; what it said is above") from None
    if isinstance(found, BaseException):
        raise found
    return found


def _reporting(result: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        result.send(function(*arguments))
    except BaseException as error:
        result.send(error)
