"""Data sets by name, and the sampler that deals them to the ranks."""

from collections.abc import Mapping
from typing import Any

from kfdist.config.named import by_name
from kfdist.data.digits import Digits
from kfdist.data.sets import DataSet
from kfdist.data.synthetic import Synthetic

DATA_SETS: Mapping[str, type[Digits | Synthetic]] = {"digits": Digits, "synthetic": Synthetic}
"""Every data set by the name that `data.name` gives it; its fields are the `data.settings`."""


def load_data(name: str, settings: Mapping[str, Any]) -> DataSet:
    """Loads a data set by name.

    Raises:
        ConfigError: The name or a setting is unknown or not allowed.
    """
    return by_name(DATA_SETS, name, settings, section="data").load()
