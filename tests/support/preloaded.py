"""What ranks of tests need, imported once by the server that they are forked from.

Neither grpc nor ray may come in here: that ranks do without them would be seen no more.
"""

import gc

import pytest  # noqa: F401
import torch._dynamo  # noqa: F401  # what tests' own optimizers of torch load at their first step

import tests.support.adoption_runs  # noqa: F401
import tests.support.training  # noqa: F401
from kfdist.system.provenance import versions

versions()  # read from files once, too

# Ranks neither look through what lives for good nor, by that, copy its pages.
gc.collect()
gc.freeze()
