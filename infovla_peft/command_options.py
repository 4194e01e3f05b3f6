"""Options of a command out of a YAML file: `infovla evaluate --config evaluation.yaml --episodes 50`."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Let a command read its options from a file; those on the command line come first."""
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from this file, `option: value` lines")


def apply_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Make what the file after `--config` says the defaults of a command.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no YAML mapping, or holds an unknown option or an unusable value.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    named = finder.parse_known_args(list(argv))[0].config
    if named is None:
        return
    path = Path(named)
    if not path.is_file():
        raise FileNotFoundError(f"no file of options at {path}")
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `option: value` lines")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for name, value in content.items():
        if name not in actions:
            near = difflib.get_close_matches(str(name), actions, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(actions)}"
            raise ValueError(f"{path}: unknown option {name!r}; {hint}")
        _set_default(actions[name], value, f"{path}: {name}")


def _set_default(action: argparse.Action, value: Any, where: str) -> None:
    several = action.nargs in ("+", "*")
    if several != isinstance(value, list):
        raise ValueError(f"{where} takes {'a list' if several else 'one value'}, not {value!r}")
    if action.nargs == 0 and not isinstance(value, bool):
        raise ValueError(f"{where} is true or false, not {value!r}")
    if action.nargs != 0:
        convert: Any = action.type or str
        try:
            values = [convert(each) for each in (value if several else [value])]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} cannot be {value!r}: {error}") from error
        if action.choices and (wrong := [each for each in values if each not in action.choices]):
            raise ValueError(f"{where} must be one of {', '.join(map(str, action.choices))}, not {wrong[0]!r}")
        value = values if several else values[0]
    action.default, action.required = value, False
    if not action.option_strings:  # a positional one may now be left out
        action.nargs = "*" if several else "?"
