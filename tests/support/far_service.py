"""A controller and owners on hosts of their own, and hosts for ranks; each process is one that users start."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfdist.system.addresses import split_address
from tests.support.commands import Command, run
from tests.support.hosts import Host, apart, made_hosts
from tests.support.launches import checkpoints_of
from tests.support.ray_nodes import NO_TOKEN, ray_nodes

_TAIL_BYTES = 16_384
_ROOT = Path(__file__).parents[2]

_SERVICE = """
[control]
address = "{control}:7070"
metrics_address = "{control}:9464"
[cluster]
owners = 2
owner_address = "node"
owner_strategy = "STRICT_SPREAD"
[security]
certificates = "{certificates}"
"""


@dataclass(frozen=True)
class Service:
    """A controller and owners on hosts of their own.

    Attributes:
        hosts: All hosts: `a`, `b` and `c` for ranks, `control`, `head` and `node` for owners, and `desk`, from where
            somebody looks.
        config: The configuration of the runs that they serve, the same on all hosts.
        folder: Where each host has its working directory, and there the runs' directories.
        environment: Of commands without a configuration.
        owners: Where each owner is, by name, as the pool says.
    """

    hosts: Mapping[str, Host]
    config: Path
    folder: Path
    environment: Mapping[str, str]
    owners: dict[str, str]

    def command(
        self, host: str, *arguments: str, environment: Mapping[str, str] | None = None, **options: Any
    ) -> Command:
        """Starts a command on a host; models of the tests are found there, too."""
        directory = self.folder / host
        directory.mkdir(exist_ok=True)
        variables = {"PYTHONPATH": str(_ROOT), **(environment or {})}
        prefix = self.hosts[host].prefix
        return Command(*arguments, host=prefix, directory=directory, environment=variables, **options)

    @contextmanager
    def torchrun(self, name: str, *overrides: str) -> Iterator[tuple[Command, Command]]:
        """Starts one rank of a run on each of the hosts `a` and `b`; it is started again once if it dies."""
        arguments = ("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "1", "--rdzv-backend", "c10d")
        arguments += ("--rdzv-id", name, "--rdzv-endpoint", f"{self.hosts['a'].address}:29501")
        arguments += ("-m", "kfdist", *self.worker(name, *overrides))
        with (
            self.command("a", *arguments, module="torch.distributed.run") as first,
            self.command("b", *arguments, module="torch.distributed.run") as second,
        ):
            yield first, second

    def worker(self, name: str, *overrides: str) -> tuple[str, ...]:
        """Returns the command of a rank of the run."""
        given = (f"run.name={name}", f"run.dir={name}", *overrides)
        return ("worker", str(self.config), *(word for override in given for word in ("--set", override)))

    def ask(self, verb: str, name: str, *arguments: str) -> dict[str, Any]:
        """Gives a command about a run, from another host still."""
        given = (verb, name, *arguments, "--address", f"{self.hosts['control'].address}:7070", "--json")
        return json.loads(run(*given, environment=self.environment, host=self.hosts["desk"].prefix))

    def owners_apart(self) -> AbstractContextManager[None]:
        """Cuts the owners' hosts off from all others, but not from each other."""
        return apart(self.hosts["head"], self.hosts["node"])

    def files(self, host: str, name: str) -> dict[str, bytes]:
        """Returns the files of a run's checkpoints that a host has."""
        checkpoints = self.folder / host / name / "checkpoints"
        return {str(path.relative_to(checkpoints)): path.read_bytes() for path in checkpoints.glob("*/*")}

    def checkpoints(self, host: str, name: str) -> list[int]:
        """Returns the steps of the checkpoints that a host has."""
        return checkpoints_of(self.folder / host / name)


@contextmanager
def far_service(folder: Path, certificates: Path, run_config: str, *, spread: bool) -> Iterator[Service]:
    """Starts a service for runs whose own sections are these, both owners on `head` unless they are to be spread."""
    with (
        made_hosts("a", "b", "c", "control", "head", "node", "desk") as hosts,
        ray_nodes(hosts) if spread else nullcontext() as ray,
    ):
        config = folder / "run.toml"
        config.write_text(run_config + _SERVICE.format(control=hosts["control"].address, certificates=certificates))
        environment = {"KFDIST_SECURITY__CERTIFICATES": str(certificates)}
        ready, owners_ready = folder / "ready.json", folder / "owners-ready.json"
        service = Service(hosts=hosts, config=config, folder=folder, environment=environment, owners={})
        pooling = ("pool", str(config), *(("--ray", ray) if ray else ()), "--ready-file", str(owners_ready), "--json")
        with (
            service.command("control", "serve", str(config), "--ready-file", str(ready)) as controller,
            service.command("head", *pooling, environment=NO_TOKEN) as pool,
        ):
            controller.wait_for_file(ready)
            pool.wait_for_file(owners_ready)
            for owner in json.loads(pool.wait_for_line("owners"))["owners"]:
                service.owners[owner["owner_id"]] = split_address(owner["address"])[0]
            yield service


def told(directory: Path) -> dict[str, Any]:
    """Returns what a run last told of its steps."""
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[1:-1]
    except FileNotFoundError:
        lines = []
    steps = (json.loads(line) for line in reversed(lines) if b'"step"' in line)
    return next((line for line in steps if line["event"] == "step"), {"step": 0, "staleness": {"max": 0}})


def oldest(directory: Path) -> int:
    """Returns of which step the oldest statistics are that an inverse in use was made of."""
    last = told(directory)
    return last["step"] - last["staleness"]["max"]
