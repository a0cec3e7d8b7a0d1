"""The configuration: typed sections, read from defaults < file < environment < command line."""

from kfdist.config.loading import config_from_table, load_config
from kfdist.config.sections import (
    CheckpointSection,
    ClusterSection,
    Config,
    ControlSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    PreconditionerSection,
    RunSection,
    StalenessSection,
)
from kfdist.config.toml import to_toml

__all__ = [
    "CheckpointSection",
    "ClusterSection",
    "Config",
    "ControlSection",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "PreconditionerSection",
    "RunSection",
    "StalenessSection",
    "config_from_table",
    "load_config",
    "to_toml",
]
