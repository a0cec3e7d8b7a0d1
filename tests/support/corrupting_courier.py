"""The courier with a fault: the first result that it writes for its rank has one byte wrong."""

from kfdist.links.courier import __main__ as courier
from kfdist.links.courier import dispatch


def main() -> None:
    write_at = dispatch.write_at
    written = 0

    def corrupt(descriptor: int, offset: int, data: bytearray) -> None:
        nonlocal written
        written += 1
        if written == 1:
            data = bytearray(data)
            data[len(data) // 2] ^= 1
        write_at(descriptor, offset, data)

    dispatch.write_at = corrupt
    courier.main()


if __name__ == "__main__":
    main()
