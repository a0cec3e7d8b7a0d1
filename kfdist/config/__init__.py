"""The configuration: typed sections, read from defaults < file < environment < command line."""

from kfdist.config.loading import config_from_table, load_config, security_from_environment
from kfdist.config.preconditioner_section import PreconditionerSection
from kfdist.config.sections import Config
from kfdist.config.service_sections import ClusterSection, SecuritySection
from kfdist.config.task_sections import OptimizerSection
from kfdist.config.toml import to_toml

__all__ = [
    "ClusterSection",
    "Config",
    "OptimizerSection",
    "PreconditionerSection",
    "SecuritySection",
    "config_from_table",
    "load_config",
    "security_from_environment",
    "to_toml",
]
