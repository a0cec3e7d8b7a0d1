"""The `kfdist` command: its subcommands, and what all of them do with errors.

Exit codes: 0 done, 1 the machine (or a process of the run) failed, 2 bad input, 75 stopped and resumable, 130 ended at
once by a second Ctrl-C. A command module imports torch, Ray or gRPC inside its functions only, so that `kfdist --help`
answers at once.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from importlib import metadata
from typing import Annotated, cast

import typer

from kfdist.cli import (
    bench_command,
    certs_command,
    control_commands,
    doctor_command,
    plan_command,
    recipe_command,
    report_command,
    run_commands,
    settings_command,
    submit_command,
    work_commands,
)
from kfdist.errors import ConfigError, EnvironmentFault, ExitCode, KfdistError, KfdistWarning
from kfdist.system.lifetime import launcher_pid, terminate_with_process
from kfdist.system.output import escape_what_cannot_be_encoded, open_missing_streams, outlive_readers
from kfdist.telemetry.logging import setup_logging

app = typer.Typer(
    name="kfdist",
    help="Trains PyTorch models with second-order optimizers, as a service.",
    epilog="Exit codes: 0 done; 1 the machine or a process failed; 2 bad input; 75 stopped, the same command resumes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels cut words and break paragraphs where a terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
)


_PYTHONS_WARNING = warnings.formatwarning

# Typer exports no other of a wrong command line's errors; what it derives from is what all of them are.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kfdist {metadata.version('kfdist')}")
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    del version


for module in (
    run_commands,
    submit_command,
    control_commands,
    settings_command,
    work_commands,
    report_command,
    recipe_command,
    plan_command,
    doctor_command,
    certs_command,
    bench_command,
):
    module.register(app)


def main() -> None:
    """Runs the command line and ends this process with its exit code.

    Set `KFDIST_DEBUG=1` to see the stack trace of expected errors too.
    """
    open_missing_streams()
    warnings.formatwarning = _warning_line
    runs = bool(sys.argv[1:2]) and sys.argv[1] in (*run_commands.COMMANDS, *submit_command.INSIDE)
    if runs:
        outlive_readers()
    else:
        escape_what_cannot_be_encoded()
    # By default gRPC writes to standard error about each handshake that fails, beside what we say about it.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR" if runs else "NONE")
    code = run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        code = code or _report(EnvironmentFault(f"standard output can't be written ({error.strerror})"), as_json=False)
    # Commands have closed what they opened. Python would now take torch's modules apart, object by object, which on a
    # busy machine takes longer than all the rest of what Ctrl-C asks for.
    os._exit(code)


def _warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Writes kfdist's own warnings as its errors are written; where in its code they come from tells users nothing."""
    if issubclass(category, KfdistWarning):
        return f"kfdist: {message}\n"
    return _PYTHONS_WARNING(message, category, filename, lineno, line)


def run() -> int:
    """Runs the command line and returns its exit code; an expected error is one message, without a stack trace."""
    if (launcher := launcher_pid()) is not None:
        terminate_with_process(launcher)
    rank = os.environ.get("RANK")  # torchrun's and the launcher's; ranks may share a terminal
    as_json = "--json" in sys.argv
    setup_logging(as_json=as_json, fields={} if rank is None else {"rank": rank})
    try:
        ended = app(prog_name="kfdist", standalone_mode=False)
        return ended if isinstance(ended, int) else ExitCode.DONE
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else ExitCode.DONE
    except _UsageError as error:
        return _report_use(error, as_json=as_json)
    except KfdistError as error:
        if os.environ.get("KFDIST_DEBUG") == "1":
            raise
        return _report(error, as_json=as_json)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of the output has gone, as in `kfdist status | head -1`; end as other tools do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # what no part of the program has a better word for: too few descriptors, a full disk
        if launcher is not None or os.environ.get("KFDIST_DEBUG") == "1":
            traceback.print_exc()  # into the process's log
        return _report(EnvironmentFault(f"the system refuses: {error}; KFDIST_DEBUG=1 shows where"), as_json=as_json)
    return ExitCode.DONE


def _report_use(error: typer.BadParameter, *, as_json: bool) -> int:
    """Tells what of the command line is wrong, as any other bad input is told, and where its help is."""
    text, path = error.format_message(), error.ctx.command_path if error.ctx is not None else "kfdist"
    if error.ctx is not None and text == error.ctx.get_help():  # no command at all
        print(text, file=sys.stderr)
        return ExitCode.BAD_INPUT
    text = f"{text[:1].lower()}{text[1:].removesuffix('.')}"
    stop = "" if text.endswith("?") else ";"
    return _report(ConfigError(f"{text}{stop} `{path} --help` says what there is"), as_json=as_json)


def _report(error: KfdistError, *, as_json: bool) -> int:
    bad_input = isinstance(error, ConfigError)
    # The exit code says it, too, where nothing can be printed any more.
    with contextlib.suppress(OSError):
        _print_error(error, bad_input=bad_input, as_json=as_json)
    return ExitCode.BAD_INPUT if bad_input else ExitCode.ENVIRONMENT


def _print_error(error: KfdistError, *, bad_input: bool, as_json: bool) -> None:
    if as_json:
        kind = "bad_input" if bad_input else "environment"
        path = error.path if isinstance(error, ConfigError) else ""
        print(json.dumps({"error": {"kind": kind, "path": path, "message": str(error)}}))
    print(f"kfdist: {error}", file=sys.stderr, flush=True)
