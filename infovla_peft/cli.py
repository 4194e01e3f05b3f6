"""`infovla <command>`: train, evaluate, analyse, demos, report, verify, act, push, list, cp, bench, doctor, ..."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .command_options import CommandParser, HelpFormatter, add_config_option, apply_config
from .commands import demonstrations, policies, runs, sharing, tools
from .commands.train import train
from .interruption import Stopped, stop_signals
from .simulation.headless import cache_folder

_DISK_FULL = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc")  # torch names no reason


def explain(error: BaseException) -> str:
    """What went wrong and what to do; the error's own words where they say it."""
    text = str(error).strip() or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in _DISK_FULL):
        return (
            f"the disk is full ({text.splitlines()[0]}); free some space and give the same command again. "
            "What was finished before is kept"
        )
    number = getattr(error, "errno", None)
    if number in (errno.ENOTDIR, errno.EEXIST):
        return f"{getattr(error, 'filename', None) or text} is, or lies below, a file; name another folder"
    if number == errno.EIO:
        return (
            f"the disk fails ({text.splitlines()[0]}); check it. What was finished before is kept: "
            "`infovla verify RUN_DIR` says whether it is whole"
        )
    if isinstance(error, PermissionError) or number == errno.EROFS:
        where = getattr(error, "filename", None) or text
        if os.path.exists(where) and not os.access(where, os.R_OK):
            return f"no permission to read {where}; get the permission, or give a copy"
        cache, place = cache_folder().absolute(), Path(str(where)).absolute()
        ours = place.is_relative_to(cache) or (cache.is_relative_to(place) and not cache.exists())
        other = "set INFOVLA_CACHE to a folder that can be written" if ours else "choose another folder (--output_dir)"
        return f"no permission to write {where}; {other}, or get the permission"
    if isinstance(error, KeyError):  # whose text is the repr of its message
        return str(error.args[0]) if error.args else text
    return text


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; errors become one message on stderr and a non-zero exit code (INFOVLA_DEBUG=1: a traceback).

    Returns:
        0, what `command` returned, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with stop_signals():
            return command() or 0
    except Stopped as stop:
        _close_bars()
        saved = f"; saved {stop.saved}" if stop.saved else ""
        name = "Ctrl-C" if stop.number == signal.SIGINT else signal.Signals(stop.number).name
        print(f"\ninfovla: stopped by {name}{saved}; the same command continues", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\ninfovla: stopped; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        _close_bars()
        if os.environ.get("INFOVLA_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        known = isinstance(error, (OSError, ValueError, RuntimeError, KeyError, ImportError))
        what = explain(error) if known else f"{type(error).__name__}: {explain(error)} (INFOVLA_DEBUG=1 shows more)"
        print(f"infovla: error: {what}", file=sys.stderr)
        return 1


def _close_bars() -> None:
    # So that the message begins on a line of its own.
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def _bench(argv: Sequence[str]) -> None:
    from .speed.command import bench

    bench(argv)


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = CommandParser(
        prog="infovla", description="Teach a vision-language-action model new robot skills one after another."
    )
    parser.add_argument("--version", action="version", version=f"infovla-peft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, formatter_class=HelpFormatter)
        added.set_defaults(handler=run)
        add_config_option(added)
        return added

    # `train` takes the recipe's options, which only `load_recipe` knows, `bench` has commands of its own; see `main`.
    commands.add_parser("train", help="learn a stream of tasks: infovla train RECIPE.yaml [--option value ...]")
    commands.add_parser("bench", help="measure speed and memory beside their references: infovla bench NAME")
    for group in (policies, demonstrations, runs, sharing, tools):
        group.register(add)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `infovla`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return run_command(lambda: train(arguments[1:]))
    if arguments[:1] == ["bench"]:
        return run_command(lambda: _bench(arguments[1:]))
    return run_command(lambda: _run(make_parser(), arguments))


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int | None:
    assert parser._subparsers is not None
    commands: Any = parser._subparsers._group_actions[0].choices
    if arguments and arguments[0] in commands:
        apply_config(commands[arguments[0]], arguments[1:])
    options: Any = parser.parse_args(arguments)
    result: int | None = options.handler(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
