"""The process that inverts: `python -m kfdist.owner.child`, started by an owner, which kills it at a job's deadline.

A deadline doesn't stop LAPACK and no exception survives a crash, so the work is done where both only cost a process.
Frames over its standard streams, see `kfdist.owner.frames`: a greeting first, then one answer per payload.
"""

import argparse
import json
import os
import signal
import time
from typing import BinaryIO

from kfdist.owner.frames import Answer, read_frame, write_frame
from kfdist.system.lifetime import exit_with_process


def main() -> None:
    """Serves jobs until its standard input ends or its owner does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--owner-pid", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the pool, which ends its owners in order
    exit_with_process(arguments.owner_pid)
    jobs, answers = _take_streams()
    _serve(jobs, answers, arguments.threads, arguments.device)


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Takes the standard streams for frames, so that nothing a library prints can get between them."""
    jobs, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return jobs, answers


def _serve(jobs: BinaryIO, answers: BinaryIO, threads: int, device: str) -> None:
    import torch

    from kfdist.curvature.fingerprint import fingerprint
    from kfdist.curvature.jobs import job_threads, run_job

    torch.set_num_threads(threads)
    write_frame(answers, Answer.GREETING, json.dumps({"fingerprint": fingerprint(device, threads)}).encode())
    while (frame := read_frame(jobs)) is not None:
        payload = frame[2]
        begun = time.perf_counter()
        try:
            torch.set_num_threads(job_threads(payload))
            result, kind = run_job(payload, device=device), Answer.RESULT
        except ValueError as error:  # the payload is malformed; anything wrong with its numbers would be a result
            result, kind = str(error).encode(), Answer.REFUSAL
        except Exception as error:  # out of memory, above all: may go better next time, or elsewhere
            result, kind = f"{type(error).__name__}: {error}".encode(), Answer.FAULT
        write_frame(answers, kind, result, seconds=time.perf_counter() - begun)


if __name__ == "__main__":
    main()
