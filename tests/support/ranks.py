"""Runs a function on several gloo ranks on this machine, as real processes; a failing or hanging rank fails the test.

Ranks come from a fork server that has imported what they need once, so that starting four of them takes a fraction of
a second. The function must be importable (defined at the top of a test module).
"""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.support.faults import act_as

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


def _rank_main(
    rank: int, world_size: int, store: str, function: Callable[..., Any], args: tuple[Any, ...], pipe: Connection
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ |= act_as(rank=rank)
    import torch
    import torch.distributed as dist  # noqa: TID251  # ranks of a test join by themselves

    from kfdist.comm.communicator import Communicator

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:  # plain pickle: multiprocessing's own would send tensors as descriptors that die with the sender
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
        )
        result = function(Communicator(dist.group.WORLD), *args)
        dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(("done", result)))
    except BaseException:
        pipe.send_bytes(pickle.dumps(("failed", traceback.format_exc())))
    finally:
        pipe.close()


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 100.0) -> list[Any]:
    """Returns what `function(communicator, *args)` returned on each rank, in rank order.

    Raises:
        AssertionError: A rank raised, died, or was not done after `timeout` seconds; all are killed then.
    """
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        ends: list[Connection] = []
        processes = []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank_main, args=(rank, world_size, store, function, args, theirs), daemon=False
            )
            process.start()
            theirs.close()
            ends.append(ours)
            processes.append(process)
        try:
            return _gather(ends, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                process.join()


def _gather(ends: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        open_ends = [end for rank, end in enumerate(ends) if rank not in results]
        ready = wait(open_ends, timeout)
        assert ready, f"ranks {sorted(set(range(len(ends))) - set(results))} were not done after {timeout} s"
        for end in ready:
            rank = ends.index(end)  # pyright: ignore[reportArgumentType]
            try:
                kind, value = pickle.loads(ends[rank].recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died without a word") from None
            assert kind == "done", f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(ends))]
