"""What users say of a loss reaches the statistics."""

import pytest

from kfdist.errors import ConfigError
from tests.support.preconditioning import backward, preconditioner, two_layers


def test_the_stated_number_of_examples_reaches_the_statistics():
    model = two_layers()
    with preconditioner(model) as pre:
        for n in (3, 5):
            pre.batch(examples=n)
            backward(model, scale=0.5)
        pre.step()
        assert {float(each["n_examples"]) for each in pre.state_dict()["sums"].values()} == {8.0}
        with pytest.raises(ConfigError, match="at least 1"):
            pre.batch(examples=0)
