"""The whole configuration, and what its sections ask of each other. A field's description is shown with its errors."""

from typing import Self

from pydantic import Field, model_validator

from kfdist.config.fields import Section
from kfdist.config.preconditioner_section import PreconditionerSection
from kfdist.config.service_sections import ClusterSection, ControlSection, SecuritySection
from kfdist.config.task_sections import (
    OWN_OPTIMIZER,
    CheckpointSection,
    DataSection,
    ModelSection,
    OptimizerSection,
    RunSection,
)
from kfdist.errors import ConfigError
from kfdist.system.addresses import UNPROTECTED, is_loopback, split_address

NORMALISED_METHODS = frozenset({"ekfac-adam", "soap", "kl-shampoo"})
"""Methods whose directions have a size of their own; those whose inverters say so (a test compares)."""


class Config(Section):
    """The whole configuration of a run."""

    run: RunSection = Field(default_factory=lambda: RunSection(steps=120))
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    preconditioner: PreconditionerSection = Field(default_factory=PreconditionerSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    control: ControlSection = Field(default_factory=ControlSection)
    security: SecuritySection = Field(default_factory=SecuritySection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)

    @model_validator(mode="after")
    def _service_needs_owners(self) -> Self:
        if self.cluster.link == "service" and self.cluster.owners < 1 and self.preconditioner.inverts:
            raise ConfigError(
                'is 0; link = "service" needs at least 1; link = "local" or method = "none" needs none',
                path="cluster.owners",
            )
        return self

    @model_validator(mode="after")
    def _grafts_replace_the_clip(self) -> Self:
        schedule = self.preconditioner.kl_clip_schedule
        if self.optimizer.grafts and schedule:
            raise ConfigError(
                'is given, and optimizer.name = "kfdist" gives each step the length of its graft\'s, without a clip: '
                'leave it out, or set optimizer.settings.graft = "none"',
                path=f"preconditioner.{schedule}",
            )
        if self.optimizer.grafts and self.preconditioner.kl_clip:
            raise ConfigError(
                f'is {self.preconditioner.kl_clip:g}, and optimizer.name = "kfdist" gives each step the length of its '
                'graft\'s; set it to 0, or optimizer.settings.graft = "none"',
                path="preconditioner.kl_clip",
            )
        if schedule and not self.preconditioner.kl_clip:
            raise ConfigError(
                "is 0, which is no clip to begin a schedule with; give one above 0", path="preconditioner.kl_clip"
            )
        return self

    @model_validator(mode="after")
    def _directions_of_adams_size_need_an_optimizer_that_knows(self) -> Self:
        method = next((each for each in self.preconditioner.named_methods if each in NORMALISED_METHODS), None)
        if method is not None and self.optimizer.name != OWN_OPTIMIZER:
            raise ConfigError(
                f"is {self.optimizer.name!r}, and directions of {method!r} have Adam's size and momentum already; set "
                f"it to {OWN_OPTIMIZER!r}, and optimizer.lr to AdamW's learning rate",
                path="optimizer.name",
            )
        return self

    @model_validator(mode="after")
    def _others_need_security(self) -> Self:
        for name in ("address", "metrics_address"):
            address = getattr(self.control, name)
            if self.security.certificates is None and not is_loopback(split_address(address)[0]):
                raise ConfigError(f"is {address!r}; {UNPROTECTED}", path=f"control.{name}")
        if self.security.certificates is None and self.cluster.owner_address == "node":
            raise ConfigError(f'is "node"; {UNPROTECTED}', path="cluster.owner_address")
        return self
