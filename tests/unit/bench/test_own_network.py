"""What is read of the kernel's counters."""

from kfdist.bench.own_network import sent_bytes

DEVICES = """Inter-|   Receive                                     |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:   12345   67    0    0    0     0          0         0 54321      67    0    0    0     0       0          0
  eth0:       9    1    0    0    0     0          0         0     7       1    0    0    0     0       0          0
"""


def test_what_loopback_sent_is_read():
    assert sent_bytes(DEVICES) == 54321
    assert sent_bytes() >= 0
