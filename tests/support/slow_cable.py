"""A cable that delays every frame and loses some: `python -m tests.support.slow_cable END END SECONDS LOSS`.

Linux has netem for that, but not every kernel has netem. The ends are new TAP devices of the network namespace that
this runs in; for them the kernel sums and segments by itself what it would leave to a card, so frames are complete. It
ends when its input does, and tells then how many frames it passed on and how many it lost.
"""

import contextlib
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque

_SET_INTERFACE, _TAP, _WITHOUT_HEADER = 0x400454CA, 0x0002, 0x1000  # TUNSETIFF, IFF_TAP, IFF_NO_PI
_LARGEST_FRAME = 1 << 16
_FRAMES_HELD = 20_000


def open_end(name: str) -> int:
    """Makes a TAP device, which lives as long as its descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _SET_INTERFACE, struct.pack("16sH22x", name.encode(), _TAP | _WITHOUT_HEADER))
    return descriptor


def main() -> None:
    one, other = open_end(sys.argv[1]), open_end(sys.argv[2])
    opposite = {one: other, other: one}
    seconds, loss = float(sys.argv[3]), float(sys.argv[4])
    chance = random.Random(0)
    held: deque[tuple[float, int, bytes]] = deque()
    told = {"passed": 0, "lost": 0}
    poll = select.poll()
    for descriptor in (one, other, sys.stdin.fileno()):
        poll.register(descriptor, select.POLLIN)
    print("ready", flush=True)
    while True:
        wait = None if not held else max(0.0, held[0][0] - time.monotonic()) * 1000
        ready = [descriptor for descriptor, _ in poll.poll(wait)]
        if sys.stdin.fileno() in ready:
            break
        for descriptor in ready:
            with contextlib.suppress(OSError):  # nothing more to read, or not up yet
                while True:
                    frame = os.read(descriptor, _LARGEST_FRAME)
                    if chance.random() < loss or len(held) >= _FRAMES_HELD:
                        told["lost"] += 1
                    else:
                        held.append((time.monotonic() + seconds, opposite[descriptor], frame))
        while held and held[0][0] <= time.monotonic():
            _, descriptor, frame = held.popleft()
            with contextlib.suppress(OSError):
                os.write(descriptor, frame)
                told["passed"] += 1
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
