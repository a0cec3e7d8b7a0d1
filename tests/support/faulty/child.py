"""The inversion process under the test's script of faults: `python -m tests.support.faulty.child`."""

import itertools

from kfdist.curvature import jobs
from kfdist.owner import child
from tests.support.faults import reach


def main() -> None:
    run_job, numbers = jobs.run_job, itertools.count(1)

    def faulty(payload: bytes, *, device: str) -> bytes:
        reach(inversion=next(numbers))
        return run_job(payload, device=device)

    jobs.run_job = faulty
    child.main()


if __name__ == "__main__":
    main()
