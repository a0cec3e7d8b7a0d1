"""Who serves a run, where, and behind which secrets: the sections cluster, control and security."""

from typing import Literal, Self

from pydantic import Field, model_validator

from kfdist.config.fields import Address, FileName, Labels, Ports, RayAddress, Resources, SecretPlace, Section
from kfdist.errors import ConfigError
from kfdist.system.credentials import Credentials, Role
from kfdist.types import MAX_DEADLINE_SECONDS, MAX_OWNERS, MAX_RANKS, MAX_THREADS, MAX_WAIT_SECONDS


class BundleSection(Section):
    """What each owner takes of a Ray node, and which nodes may have one."""

    cpus: float | None = Field(default=None, gt=0, description="CPUs of each owner; cluster.threads if not given")
    gpus: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of a GPU, and of its memory, on which each owner inverts; 0: on CPUs",
    )
    resources: Resources = Field(
        default_factory=dict, description="how much of Ray's custom resources each owner takes"
    )
    labels: Labels = Field(
        default_factory=dict,
        description='which labels its node has, as Ray\'s label selectors: "A100", "!A100", "in(A100, H100)"',
    )


class ClusterSection(Section):
    """The processes of a run."""

    workers: int = Field(default=2, ge=1, le=MAX_RANKS, description="training ranks that `kfdist train` starts")
    owners: int = Field(default=2, ge=0, le=MAX_OWNERS, description="Ray actors that invert")
    owner_address: Literal["loopback", "node"] = Field(
        default="loopback",
        description="where owners listen: on loopback, or on their Ray node's address, for ranks of other machines",
    )
    owner_ports: Ports | None = Field(
        default=None,
        description="the first and the last port on which owners may listen, for firewalls; any if not given",
    )
    owner_strategy: Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"] = Field(
        default="SPREAD",
        description='how Ray places owners over the nodes of an existing cluster; with owner_address = "node"',
    )
    bundle: BundleSection = Field(
        default_factory=BundleSection, description="what each owner takes of a Ray node, and which nodes may have one"
    )
    threads: int = Field(
        default=1,
        ge=1,
        le=MAX_THREADS,
        description="CPU threads of each rank and of each owner's inversion; part of the run's numbers",
    )
    ray: RayAddress = Field(
        default="local", description='where Ray is: "local" for one of our own, "auto", or an address, "10.0.0.2:6379"'
    )
    assignment: Literal["round_robin", "model_order", "lpt"] = Field(
        default="round_robin",
        description="how groups are dealt to owners: in turn from the dearest on, in turn in the model's order, or "
        "lpt: the dearest first, to whoever has least to do",
    )
    link: Literal["service", "local"] = Field(
        default="service", description="service: owners invert; local: the ranks do it themselves"
    )
    job_deadline_seconds: float = Field(
        default=60.0,
        gt=0,
        le=MAX_DEADLINE_SECONDS,
        description="how long one inversion may take before it is killed and retried",
    )
    group_timeout_seconds: float = Field(
        default=300.0, gt=0, le=MAX_WAIT_SECONDS, description="how long a rank waits in a collective for the others"
    )

    @model_validator(mode="after")
    def _ports_rise(self) -> Self:
        if self.owner_ports is not None and self.owner_ports[0] > self.owner_ports[1]:
            raise ConfigError(f"is {list(self.owner_ports)}; write the first port, then the last", path="owner_ports")
        return self


class ControlSection(Section):
    """The controller."""

    address: Address = Field(default="127.0.0.1:7070", description="where the controller serves gRPC")
    metrics_address: Address = Field(
        default="127.0.0.1:9464", description="where the controller serves /metrics over HTTP"
    )
    database: FileName | None = Field(
        default=None,
        description="the controller's SQLite file, seen from the working directory of whoever serves; control.sqlite "
        "in the run directory if not given",
    )


class SecuritySection(Section):
    """What lets others reach the controller and the owners: TLS with certificates on both sides, and a token.

    Only places are named here: what is in the files never stands in a configuration.
    """

    certificates: SecretPlace | None = Field(
        default=None, description="directory that `kfdist certs init` made, on every node; without it, all is loopback"
    )
    token_file: SecretPlace | None = Field(
        default=None, description="the file with the token; `token` in the directory of certificates if not given"
    )

    @model_validator(mode="after")
    def _token_needs_certificates(self) -> Self:
        if self.token_file is not None and self.certificates is None:
            raise ConfigError(
                f"is {self.token_file!r}, and security.certificates is missing: a token travels over TLS only; give "
                "both, or neither",
                path="token_file",
            )
        return self

    def credentials(self, role: Role) -> Credentials | None:
        """Returns what a process of this role shows to others; None if nothing is configured."""
        return Credentials.at(role, self.certificates, self.token_file)
