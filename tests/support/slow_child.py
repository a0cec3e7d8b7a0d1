"""The inversion process with a delay: it sleeps as many seconds as a file says before each real inversion.

The file is named by the environment variable SLOW_CHILD, so that a test can change the delay while an owner lives.
"""

import os
import time
from pathlib import Path

from kfdist.curvature import jobs
from kfdist.owner import child

VARIABLE = "SLOW_CHILD"


def main() -> None:
    file, run_job = Path(os.environ[VARIABLE]), jobs.run_job

    def slow(payload: bytes, *, device: str) -> bytes:
        time.sleep(float(file.read_text()))
        return run_job(payload, device=device)

    jobs.run_job = slow
    child.main()


if __name__ == "__main__":
    main()
