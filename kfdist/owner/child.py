"""The process that inverts: `python -m kfdist.owner.child`, started by an owner, which kills it at a job's deadline.

A deadline doesn't stop LAPACK and no exception survives a crash, so the work is done where both only cost a process.
It greets with a JSON object that has its fingerprint, or why it can't work, and answers each payload with one: the kind
of answer, and the seconds of the inversion, with the bytes of the result to follow, or the reason why there is none.
"""

import argparse
import gc
import json
import os
import signal
import time
from enum import StrEnum
from multiprocessing.connection import Connection

from kfdist.system.imports import uncollected
from kfdist.system.lifetime import exit_with_process


class Answer(StrEnum):
    """Kinds of answers to a payload."""

    RESULT = "result"
    """What `kfdist.curvature.jobs.run_job` returned is the next message."""
    REFUSAL = "refusal"
    """The payload is malformed."""
    FAULT = "fault"
    """The inversion raised."""


def main() -> None:
    """Serves jobs until its owner closes the connection or ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connection", type=int, required=True, metavar="DESCRIPTOR")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpu-share", type=float, default=1.0)
    parser.add_argument("--owner-pid", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the pool, which ends its owners in order
    exit_with_process(arguments.owner_pid)
    os.set_inheritable(arguments.connection, False)
    with Connection(arguments.connection) as owner:
        _serve(owner, arguments.threads, arguments.device, arguments.gpu_share)


def _serve(owner: Connection, threads: int, device: str, gpu_share: float) -> None:
    with uncollected():
        import torch

        from kfdist.curvature.jobs import fingerprint, job_threads, run_job
    gc.freeze()  # nor at the end, when a collection of all that torch made takes longer than a small job

    def say(**content: object) -> None:
        owner.send_bytes(json.dumps(content).encode())

    torch.set_num_threads(threads)
    if device != "cpu":
        if not torch.cuda.is_available():
            say(
                fault=f"it is to invert on {device!r}, but torch {torch.__version__} sees no GPU "
                f"(CUDA_VISIBLE_DEVICES is {os.environ.get('CUDA_VISIBLE_DEVICES')!r}); set cluster.bundle.gpus = 0, "
                "or install torch with CUDA on the nodes of owners"
            )
            return
        torch.cuda.set_per_process_memory_fraction(gpu_share)  # Ray only counts shares; owners on one GPU keep to them
    say(fingerprint=fingerprint(device, threads))
    while True:
        try:
            payload = owner.recv_bytes()
        except (EOFError, OSError):  # the owner has gone, between two messages or within one
            return
        begun = time.perf_counter()
        try:
            torch.set_num_threads(job_threads(payload))
            result = run_job(payload, device=device)
        except ValueError as error:  # the payload is malformed; anything wrong with its numbers would be a result
            say(kind=Answer.REFUSAL, reason=str(error))
        except Exception as error:  # out of memory, above all: may go better next time, or elsewhere
            if device != "cpu" and not _device_answers():
                raise  # in this process every later job would fail alike; without it the owner starts another
            say(kind=Answer.FAULT, reason=f"{type(error).__name__}: {error}")
        else:
            say(kind=Answer.RESULT, seconds=time.perf_counter() - begun)
            owner.send_bytes(result)


def _device_answers() -> bool:
    """Gives back what is cached of a GPU's memory; says whether it still does what this process asks.

    After an error in a kernel, such as an access out of bounds, it never does again.
    """
    import torch

    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    main()
