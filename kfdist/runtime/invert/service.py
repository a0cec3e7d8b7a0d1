"""Where a preconditioner's inversions are done when not in its own process."""

import re
import time
from dataclasses import dataclass

from kfdist import checks
from kfdist.errors import ConfigError
from kfdist.links.link import AbstractLink
from kfdist.links.local import LocalLink
from kfdist.policies.assignment import POLICIES
from kfdist.policies.epochs import largest_epoch
from kfdist.system.addresses import server_address
from kfdist.system.credentials import Credentials, Role
from kfdist.types import MAX_DEADLINE_SECONDS, RUN_NAME_PATTERN

DEADLINE_SECONDS = 120.0
"""How long one inversion may run by default; the largest layer of ResNet-50 takes seconds."""

DEVICES = ("cpu", "cuda")
"""Where owners invert."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """An inversion service and how this run uses it; made by `kfdist.connect`, which documents each field."""

    address: str
    run: str = "default"
    epoch: int | None = None
    assignment: str = "round_robin"
    deadline_seconds: float = DEADLINE_SECONDS
    credentials: Credentials | None = None
    device: str = "cpu"
    first_step: int = 0

    def __post_init__(self) -> None:
        server_address(self.address, field="address")
        if not re.fullmatch(RUN_NAME_PATTERN, self.run):
            raise ConfigError(
                f"the run's name is {self.run!r}; 1 to 63 letters, digits, '.', '_' and '-' are needed, with a letter "
                "or digit at both ends"
            )
        if self.epoch is not None:
            hint = "or None, which draws one from rank 0's clock"
            checks.count("epoch", self.epoch, least=1, hint=hint)
            most = largest_epoch(0, in_directory=False, now_ns=time.time_ns())
            checks.number("epoch", self.epoch, least=1, most=most, hint=hint)
        checks.choice("assignment", self.assignment, POLICIES)
        checks.number("deadline_seconds", self.deadline_seconds, above=0, most=MAX_DEADLINE_SECONDS)
        checks.choice("device", self.device, DEVICES)
        checks.count("first_step", self.first_step, least=0)


def connect(
    address: str,
    *,
    run: str = "default",
    epoch: int | None = None,
    assignment: str = "round_robin",
    deadline_seconds: float = DEADLINE_SECONDS,
    certificates: str | None = None,
    token_file: str | None = None,
    device: str = "cpu",
    first_step: int = 0,
) -> Service:
    """Says which service a preconditioner's inversions go to; nothing is contacted until the preconditioner is made.

    Args:
        address: The controller's address, "host:port".
        run: Name of the run at the controller.
        epoch: Number of this start of the run; a later start must have a larger one, since older messages are refused.
            At most what the clock says in milliseconds since 1970, and a day. One of the same number begins once the
            earlier one has ended: after `close`, or some ten seconds after the last message of ranks that were killed.
            Until then it is taken for another run of this name and stopped. None draws one from rank 0's clock.
        assignment: How groups are dealt to owners: "round_robin" (over cost-sorted groups), "model_order" or "lpt".
        deadline_seconds: How long one inversion may run before its process is killed and the job sent again; a day at
            most.
        certificates: Directory that `kfdist certs init` made, for a controller that demands TLS and a token.
        token_file: The file with the token; `token` in that directory if None.
        device: Where the owners invert, "cpu" or "cuda". Only `FixedLag` looks at it: an owner must then compute what
            this rank would on such a device, bit for bit, so that it doesn't matter who inverts.
        first_step: The step at which this start begins, if it loads a state; the controller shows it until the rank
            tells another.

    Raises:
        ConfigError: A value is out of range.
    """
    return Service(
        address=address,
        run=run,
        epoch=epoch,
        assignment=assignment,
        deadline_seconds=deadline_seconds,
        credentials=Credentials.at(Role.CLIENT, certificates, token_file),
        device=device,
        first_step=first_step,
    )


def make_link(link: Service | AbstractLink | None) -> AbstractLink:
    """Makes the link a user asked for: the local one by default."""
    if link is None:
        return LocalLink()
    if isinstance(link, AbstractLink):
        return link
    from kfdist.links.rank.remote import RemoteLink  # only runs with a service need it

    return RemoteLink(link.address, link.credentials)
