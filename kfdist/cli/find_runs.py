"""Finding runs: of this machine by what their processes post, of a directory by its files, of a controller by asking.

A RUN on the command line is a name, or a directory: anything with a slash in it, `.`, or, where no run of this machine
has the name, a directory of that name here or in `runs`.
"""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kfdist.checks import suggestion
from kfdist.cli.run_files import RunFiles
from kfdist.cli.run_target import Endpoint, Target
from kfdist.control.client import RunView
from kfdist.control.control_records import RunState
from kfdist.errors import ConfigError, EnvironmentFault
from kfdist.system.addresses import is_loopback, server_address, split_address
from kfdist.system.run_notices import RunNotice, notices

DEFAULT_ADDRESS = "127.0.0.1:7070"
"""Where `kfdist serve` listens by default, asked when no notice says of another controller."""

HOME = Path("runs")
"""Where runs are unless run.dir says otherwise."""

_SURVEY_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """A run as it was seen, and where.

    Attributes:
        view: How it stands.
        target: Where it can be asked.
        answered: Whether its controller did; else its files tell how it stands.
    """

    view: RunView
    target: Target
    answered: bool = True

    @property
    def going(self) -> bool:
        """Whether it can still be steered."""
        return not self.view.state.ended


@dataclass(frozen=True)
class Survey:
    """The runs of this machine, or of one controller.

    Attributes:
        runs: What was found.
        silent: Why some controllers didn't answer.
        asked: The one controller that was asked; None where this user's notices led to all.
    """

    runs: Sequence[Found]
    silent: Sequence[str] = ()
    asked: str | None = None

    def going(self) -> list[Found]:
        """Returns the runs that can be steered; those whose ranks are gone only if there are no others."""
        going = [each for each in self.runs if each.going]
        return [each for each in going if each.view.state is not RunState.LOST] or going

    def nothing(self) -> str:
        """Says that there is no run, and what to do."""
        return nothing_runs() if self.asked is None else f"the controller at {self.asked} knows no run yet"


def find_run(run: str | None, address: str | None) -> Target:
    """Finds the run that a command is about.

    Args:
        run: A name or a directory, as given; None for the only one that there is.
        address: The controller, as given; None for those of this machine.

    Raises:
        ConfigError: There is no such run, or several might be meant.
        EnvironmentFault: No run is there, or no controller answers.
    """
    if run is not None and _is_path(run):
        return _in_directory(Path(run), address)
    if run is not None and address is not None:
        return Target(name=run, controller=_given(address))
    survey = look_around(address)
    if run is None:
        return _only(survey, address)
    named = [each for each in survey.runs if each.view.name == run]
    if found := [each for each in named if each.going] or named:
        return _one_of(found, f"{len(found)} runs are named {run!r}")
    for directory in (Path(run), HOME / run):
        if RunFiles.at(directory) is not None:
            return _in_directory(directory, address)
    if survey.silent:
        raise EnvironmentFault("; ".join(survey.silent))
    known = [each.view.name for each in survey.runs] + [path.name for path in ended_directories()]
    if not known:
        raise ConfigError(f"there is no run {run!r}: {survey.nothing()}")
    raise unknown_run(run, known)


def unknown_run(run: str, known: Sequence[str]) -> ConfigError:
    """Returns what is said of a name that no run has, given the names that runs have."""
    there_are = f"known here: {', '.join(sorted(set(known)))}" if known else nothing_runs()
    return ConfigError(f"there is no run {run!r} here{suggestion(run, known)}; {there_are}")


def find_controller(address: str | None, owner: str) -> Endpoint:
    """Finds the controller that a command about an owner is for: the one given, or that of this machine which has it.

    Raises:
        ConfigError: There are several, and not one of them alone has the owner.
        EnvironmentFault: There is none.
    """
    if address is not None:
        return _given(address)
    own = {notice.address: notice for notice in notices() if notice.address}
    if len(own) > 1:
        owners = {at: _owners_at(_endpoint(each)) for at, each in own.items()}
        having = [at for at, names in owners.items() if owner in names]
        if len(having) == 1:
            return _endpoint(own[having[0]])
        told = "; ".join(f"{at} has {', '.join(names) or 'none'}" for at, names in owners.items())
        count = "several" if having else "none"
        raise ConfigError(
            f"{count} of the controllers of this machine has an owner {owner!r}: {told}. Name one of these owners, or "
            "a controller with --controller"
        )
    if own:
        return _endpoint(next(iter(own.values())))
    if _listens(DEFAULT_ADDRESS):
        return Endpoint(address=DEFAULT_ADDRESS)
    raise EnvironmentFault(nothing_runs())


def _owners_at(controller: Endpoint) -> list[str]:
    """Returns the names of a controller's live owners; none if it doesn't answer."""
    with suppress(EnvironmentFault), controller.client(seconds=_SURVEY_SECONDS) as client:
        return [each.name for run in client.runs()[:1] for each in client.owners(run.name)]
    return []


def look_around(address: str | None) -> Survey:
    """Looks at all runs of this machine, or of one controller, the newest first."""
    if address is not None:
        with _given(address).client() as client:
            return Survey([_seen(view, _given(address)) for view in client.runs()], asked=address)
    posted = notices()
    if not posted and _listens(DEFAULT_ADDRESS):
        return look_around(DEFAULT_ADDRESS)
    found: list[Found] = []
    silent: list[str] = []
    by_address: dict[str, list[RunNotice]] = {}
    for notice in posted:
        by_address.setdefault(notice.address, []).append(notice)
    for at, notes in by_address.items():
        if not at:
            found += map(_by_files, notes)
            continue
        try:
            found += _ask(notes)
        except EnvironmentFault as fault:
            silent.append(str(fault))
            found += [replace(_by_files(note), answered=False) for note in notes if note.run]
    # A controller that listens on all addresses may have been asked at two of them.
    once = {(each.view.name, each.view.created, each.view.epoch): each for each in reversed(found)}
    return Survey(sorted(once.values(), key=lambda each: each.view.created, reverse=True), silent)


def ended_directories(parent: Path = HOME) -> list[Path]:
    """Returns the run directories in `runs`, the one that changed last first."""
    with suppress(OSError):
        found = [path.parent for path in parent.glob("*/config.toml")]
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return []


def nothing_runs() -> str:
    """Says that no run is there, how to start one, and where those are that have ended."""
    text = "nothing runs on this machine; `kfdist train` starts a run"
    if past := ended_directories():
        shown = [f"{path} ({RunFiles(path).standing()})" for path in past[:5]]
        more = f" and {len(past) - len(shown)} more in {HOME}" if len(past) > len(shown) else ""
        text += f". Ended runs: {', '.join(shown)}{more}; `kfdist status {past[0]}` shows one"
    return text


def _only(survey: Survey, address: str | None) -> Target:
    """Returns the run that is meant when none is named."""
    going = survey.going()
    if not going:
        raise EnvironmentFault("; ".join(survey.silent) or survey.nothing())
    if survey.asked != address:  # nobody has named this controller; it may be somebody else's
        names = ", ".join(each.view.name for each in going)
        raise ConfigError(f"name the run that you mean: {names}, of the controller at {survey.asked}")
    return _one_of(going, f"{len(going)} runs are going")


def _one_of(found: Sequence[Found], why: str) -> Target:
    if len(found) == 1:
        return found[0].target
    names = [each.view.name for each in found]
    lines = []
    for each in found:
        where = each.target.controller.address if each.target.controller else "no controller"
        unique = names.count(each.view.name) == 1
        way = each.view.name if unique else each.view.directory or f"{each.view.name} --controller {where}"
        lines.append(f"  {way}  ({each.view.state} at step {each.view.step}, {where})")
    raise ConfigError("\n".join([f"{why}; name one:", *lines]))


def _in_directory(path: Path, address: str | None) -> Target:
    """Returns the run in a directory, with whoever controls it now."""
    files = RunFiles.at(path)
    near = [note for note in notices() if note.place is not None and files is not None and note.place == files.place]
    if files is None:
        what = "there is no such directory" if not path.exists() else "there is no config.toml in it"
        raise ConfigError(f"{path} holds no run: {what}; `kfdist status` lists what runs{_past(path)}")
    if address is not None:
        return Target(name=files.name, controller=_given(address), files=files)
    for note in near:
        if note.address:
            return Target(name=note.run or files.name, controller=_endpoint(note), files=files)
    if files.trainer and not near and (at := files.control_address) and _is_here(files, at):
        certificates, token_file = files.security
        there = Endpoint(address=at, certificates=certificates, token_file=token_file)
        return Target(name=files.name, controller=there, files=files, start=files.last_start)
    return Target(name=files.name, files=files)


def _past(path: Path) -> str:
    runs = [each.name for each in ended_directories(path)] if path.is_dir() else []
    return f"; in it are the runs {', '.join(runs[:5])}" if runs else ""


def _is_here(files: RunFiles, address: str) -> bool:
    """Tells whether a controller's address means the same here as where the run trains."""
    host, _ = split_address(address)
    return not is_loopback(host) or f" on {socket.gethostname()}," in f"{files.trainer},"


def _ask(notes: Sequence[RunNotice]) -> list[Found]:
    """Asks a controller for its runs: for all if it is of this machine, else for those that this machine trains."""
    endpoint = _endpoint(notes[0])
    with endpoint.client(seconds=_SURVEY_SECONDS) as client:
        runs = client.runs()
    ours = {note.run: note for note in notes if note.run}
    everything = any(note.database for note in notes)
    return [_seen(view, endpoint, ours.get(view.name)) for view in runs if everything or view.name in ours]


def _seen(view: RunView, endpoint: Endpoint, note: RunNotice | None = None) -> Found:
    directory = view.directory or (note.directory if note is not None else "")
    files = RunFiles.at(Path(directory)) if directory else None
    target = Target(name=view.name, controller=endpoint, files=files)
    return Found(view=replace(view, directory=directory), target=target)


def _by_files(note: RunNotice) -> Found:
    files = RunFiles(Path(note.directory))
    view = replace(files.view(), name=note.run, state=RunState.RUNNING)
    controller = _endpoint(note) if note.address else None
    return Found(view=view, target=Target(name=note.run, controller=controller, files=files))


def _endpoint(note: RunNotice) -> Endpoint:
    return Endpoint(address=note.address, certificates=note.certificates, token_file=note.token_file)


def _given(address: str) -> Endpoint:
    server_address(address, field="--controller")
    return Endpoint(address=address)


def _is_path(run: str) -> bool:
    return os.sep in run or run in (os.curdir, os.pardir)


def _listens(address: str) -> bool:
    try:
        with socket.create_connection(split_address(address), timeout=0.5):
            return True
    except OSError:
        return False
