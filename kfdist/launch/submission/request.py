"""What a submitter hands to its job: the configuration and the job's own options, in one environment variable."""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from kfdist.config import Config, config_from_table, security_from_environment
from kfdist.errors import ConfigError

VARIABLE = "KFDIST_SUBMISSION"


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A run to be trained by a Ray job.

    Attributes:
        config: The resolved configuration, as TOML.
        gpus_per_worker: GPUs of each rank, 0 or 1.
        max_failures: How often Ray Train may start all ranks again; -1 without end.
        storage: Where Ray Train keeps its copies of checkpoints: a directory that all nodes see, or a URI.
    """

    config: str
    gpus_per_worker: int
    max_failures: int
    storage: str

    def variables(self) -> dict[str, str]:
        """Returns the environment of the job."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def of_this_job(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Reads what `variables` made.

        Raises:
            ConfigError: This is no job of `kfdist submit`.
        """
        try:
            return cls(**json.loads(environment[VARIABLE]))
        except (KeyError, ValueError, TypeError):
            raise ConfigError(f"{VARIABLE} doesn't hold a submission; start this with `kfdist submit`") from None

    def configuration(self) -> Config:
        """Returns the configuration; where this node's certificates are, its own environment says.

        Raises:
            ConfigError: It is wrong, as for another version of kfdist.
        """
        config = config_from_table(tomllib.loads(self.config))
        return config.model_copy(update={"security": security_from_environment(otherwise=config.security)})
