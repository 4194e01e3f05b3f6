"""Options of a command: in either spelling, and out of a YAML file (`infovla evaluate --config evaluation.yaml`)."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .reading import read_yaml


class CommandParser(argparse.ArgumentParser):
    """A parser that takes `--max-steps` for `--max_steps` and `--dry_run` for `--dry-run`; so do its commands."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # `find_config` knows whole names alone
        # Python's own knows no exponent, and takes -1e-3 for an option.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        for place, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                words[place] = known.get(name.replace("_", "-"), name) + equals + value
        return super().parse_known_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        choices = [str(choice) for choice in action.choices or ()]
        if value not in (action.choices or (value,)) and (near := difflib.get_close_matches(str(value), choices, n=2)):
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}; did you mean {' or '.join(near)}?")
        super()._check_value(action, value)


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of an option behind its help, unless it is none: what holds then, the help says in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Let a command read its options from a file; those on the command line come first."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from this file, `option: value` lines")


def find_config(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file after `--config`, and the other arguments."""
    finder = argparse.ArgumentParser(prog="infovla", add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    found, others = finder.parse_known_args(list(argv))
    return found.config, others


def apply_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Make what the file after `--config` says the defaults of a command; `null` keeps the command's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no YAML mapping, or holds an unknown option or an unusable value.
    """
    path, _ = find_config(argv)
    if path is None:
        return
    if not path.is_file():
        raise FileNotFoundError(f"no file of options at {path}")
    content = read_yaml(path, error=ValueError, cure="write `option: value` lines")
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `option: value` lines")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    seen = set()
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(actions)}"
            raise ValueError(f"{path}: unknown option {key!r:.80}; {hint}")
        if name in seen:
            raise ValueError(f"{path}: the option {name!r} is given twice, as {key!r} too; keep one")
        seen.add(name)
        _set_default(actions[name], value, f"{path}: {key}")


def _set_default(action: argparse.Action, value: Any, where: str) -> None:
    if value is None:
        if action.required and action.default is None:
            raise ValueError(f"{where} has no value, and the command needs one")
        return
    several = action.nargs in ("+", "*")
    if several != isinstance(value, list):
        raise ValueError(f"{where} takes {'a list' if several else 'one value'}, not {value!r:.80}")
    if action.nargs == "+" and not value:
        raise ValueError(f"{where} takes a list of at least one value; leave the line out for the command's own")
    if action.nargs == 0 and not isinstance(value, bool):
        raise ValueError(f"{where} is true or false, not {value!r:.80}")
    if action.nargs != 0:
        values = [_converted(action, each, where) for each in (value if several else [value])]
        value = values if several else values[0]
    action.default, action.required = value, False
    if not action.option_strings:  # a positional one may now be left out
        action.nargs = "*" if several else "?"


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    """A value as the command line would give it: out of its text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{where} cannot be {value!r:.80}; write a number or a text, in quotes if it is `true`")
    convert: Any = action.type or str
    if convert is str and isinstance(value, float):  # 1.10 would be 1.1
        raise ValueError(f"{where} is a text, not the number {value!r}; write it in quotes")
    try:
        result = convert(str(value))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"{where} cannot be {value!r:.80}: {error}") from error
    if action.choices and result not in action.choices:
        raise ValueError(f"{where} must be one of {', '.join(map(str, action.choices))}, not {result!r:.80}")
    return result


def split_recipe(argv: Sequence[str], prog: str) -> tuple[Path | None, list[str]]:
    """The recipe's path, if the arguments begin with one or name it as `--config`, and the options.

    Raises:
        ValueError: neither a recipe nor an option was given, or two recipes.
    """
    if not argv:
        raise ValueError(f"say what to do: {prog} RECIPE.yaml [--option value ...]; --help explains every option")
    named, others = find_config(argv)
    if not others or others[0].startswith("-"):
        return named, others
    if named is not None:
        raise ValueError(f"two recipes, {others[0]} and --config {named}; give one, and its changes as options")
    return Path(others[0]), others[1:]
