"""A network of one process and those that it starts: a loopback device that nothing else uses, and its counter."""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def enter_own_network() -> bool:
    """Moves this process, with what it starts, into a network namespace with a loopback device that is up.

    Returns:
        Whether the kernel allows it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _NEW_NETWORK | (_NEW_USER if os.getuid() else 0)
    if libc.unshare(flags) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        request = struct.pack("16sh14x", b"lo", 0)
        (up,) = struct.unpack_from("h", fcntl.ioctl(asked, _GET_FLAGS, request), 16)
        fcntl.ioctl(asked, _SET_FLAGS, struct.pack("16sh14x", b"lo", up | _UP))
    return True


def sent_bytes(text: str | None = None) -> int:
    """Returns what this network's loopback device has sent, headers included.

    Args:
        text: What the kernel says of its devices; None asks it.
    """
    lines = (Path("/proc/net/dev").read_text(encoding="ascii") if text is None else text).splitlines()
    (fields,) = (line.partition(":")[2].split() for line in lines if line.partition(":")[0].strip() == "lo")
    return int(fields[8])
