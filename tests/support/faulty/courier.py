"""The courier under the test's script of faults: `python -m tests.support.faulty.courier`."""

import itertools

from kfdist.links.courier import __main__ as courier
from kfdist.links.courier import dispatch
from tests.support.faults import corrupted, reach


def main() -> None:
    write_at, numbers = dispatch.write_at, itertools.count(1)

    def faulty(descriptor: int, offset: int, data: bytearray) -> None:
        wrong = reach("corrupt", written=next(numbers))
        write_at(descriptor, offset, corrupted(data) if wrong else data)

    dispatch.write_at = faulty
    courier.main()


if __name__ == "__main__":
    main()
