"""Reading files that anybody may have written: JSON and YAML within bounds, and checks that name file, place and cure.

Refused are: what is larger or deeper than anything this package writes, a key that is given twice, NaN and infinity,
integers beyond 64 bits, text that is no Unicode, YAML aliases that multiply, and every YAML tag beyond plain values.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Generic, NoReturn, TypeVar

import yaml

LARGEST_JSON = 64 << 20
"""Bytes. The largest that is written, analysis.json of a long stream, has a few megabytes."""
LARGEST_YAML = 1 << 20
DEEPEST = 64
"""Levels of nesting; nothing that is written has more than ten."""
MOST_NODES = 100_000
"""Values of a YAML file, those counted again that an alias repeats."""

Error = TypeVar("Error", bound=Exception)


def read_json(path: Path, *, error: type[Error], cure: str) -> Any:
    """The content of a JSON file.

    Args:
        error: what is raised if it cannot be read.
        cure: what to do then; the end of the message.

    Raises:
        FileNotFoundError: there is none.
        error: it is damaged, or beyond the bounds of this module.
    """
    try:
        return parse_json(read_text(path, LARGEST_JSON))
    except FileNotFoundError:
        raise
    except NotADirectoryError as reason:
        raise FileNotFoundError(_below_a_file(path)) from reason
    except (ValueError, RecursionError, OSError) as reason:
        raise error(f"{path} is no valid JSON ({reason}); {cure}") from reason


def _below_a_file(path: Path) -> str:
    return f"there is no {path}: what should be the folder around it is a file; name a folder"


def parse_json(text: str) -> Any:
    """`json.loads` within the bounds of this module.

    Raises:
        ValueError, RecursionError: it is beyond them, or no JSON.

    >>> parse_json('{"seed": 0, "seed": 1}')
    Traceback (most recent call last):
    ValueError: the key 'seed' is given twice
    """
    content = json.loads(
        text, parse_constant=_refuse_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_object
    )
    _check_depth(content)
    if "\\u" in text:  # a JSON escape may stand for half a character
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    return content


def read_yaml(path: Path, *, error: type[Error], cure: str) -> Any:
    """The content of a YAML file: mappings, sequences and plain values.

    Args, Raises: as for `read_json`.
    """
    try:
        return _BoundedLoader(read_text(path, LARGEST_YAML)).get_single_data()
    except FileNotFoundError:
        raise
    except NotADirectoryError as reason:
        raise FileNotFoundError(_below_a_file(path)) from reason
    # PyYAML lets through what its own conversions raise: a date that does not exist, an unhashable key.
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError, OSError) as reason:
        # Without what the chain of exceptions would show.
        raise error(f"{path} is not valid YAML: {_without_content(reason)}; {cure}") from None


def _without_content(reason: Exception) -> str:
    """What is wrong with a YAML file, and where; not the line itself, which may hold a token."""
    problem = str(reason)
    if isinstance(reason, yaml.MarkedYAMLError) and reason.problem and reason.problem_mark:
        problem = f"{reason.problem} (line {reason.problem_mark.line + 1}, column {reason.problem_mark.column + 1})"
    return re.sub("'[^']{21,}'", "'...'", problem)


def read_text(path: Path, largest: int = LARGEST_JSON) -> str:
    """The content of a regular file, UTF-8, of up to `largest` bytes.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is no regular file, larger, or no UTF-8.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest >> 20} MiB")
    return content.decode("utf-8")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not allowed")


def _float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.40} is too large")
    return number


def _int(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"{digits:.40} is too large")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_keys(key for key, _ in pairs)
    return dict(pairs)


def _check_keys(keys: Iterable[Hashable]) -> None:
    seen: set[Hashable] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"the key {key!r:.60} is given twice")
        seen.add(key)


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST):
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST} levels")


class _BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that counts what aliases repeat, and knows no NaN, no infinity and no key twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth, self._nodes = 0, 0
        self._size: dict[int, int] = {}  # of each finished node

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        before, self._depth = self._nodes, self._depth + 1
        if self._depth > DEEPEST:
            raise ValueError(f"nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._size:
            raise ValueError("a value contains itself")
        self._nodes += self._size[id(node)] if is_alias else 1
        if self._nodes > MOST_NODES:
            raise ValueError(f"more than {MOST_NODES} values, counting those that aliases repeat")
        self._size.setdefault(id(node), self._nodes - before)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        _check_keys(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def finite(self, node: Any) -> float:
        number = float(self.construct_yaml_float(node))
        if not math.isfinite(number):
            raise ValueError(f"{node.value:.40} is no finite number")
        return number

    def bounded(self, node: Any) -> int:
        if len(node.value) > 40:
            raise ValueError(f"{node.value:.40} is too large")
        return int(self.construct_yaml_int(node))


_BoundedLoader.add_constructor("tag:yaml.org,2002:float", _BoundedLoader.finite)
_BoundedLoader.add_constructor("tag:yaml.org,2002:int", _BoundedLoader.bounded)


def is_inside(path: str) -> bool:
    """Whether a path of a file stays below the folder it is relative to, on every operating system.

    >>> [is_inside(path) for path in ("videos/a.mp4", "/etc/passwd", "../a", "C:/a", "")]
    [True, False, False, False, False]
    """
    parts = PurePosixPath(path).parts
    return (
        bool(parts) and parts[0] != "/" and ".." not in parts and not any(sign in path for sign in ("\\", ":", "\0"))
    )


JSON_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "an array",
}


class Checker(Generic[Error]):
    """Checks the content of a JSON file piece by piece; every error names the file, the place and the cure.

    Args:
        source: the file.
        error: what is raised.
        cure: what to do then; the end of every message.
    """

    def __init__(self, source: str, error: type[Error], cure: str) -> None:
        self.source, self.error, self.cure = source, error, cure

    def fail(self, where: str, expected: str, got: object) -> NoReturn:
        raise self.error(f"{self.source}: {where} must be {expected}, got {got!r:.80}; {self.cure}")

    def need(self, condition: bool, where: str, expected: str, got: object) -> None:
        if not condition:
            self.fail(where, expected, got)

    def version(self, content: Any, newest: int) -> None:
        """The content is an object whose `format_version` is `newest`."""
        found = self.typed(content, dict, "the content").get("format_version")
        if type(found) is not int or found != newest:
            # With a later version nothing is wrong with the file.
            cure = "" if type(found) is int and found > newest else f", or {self.cure}"
            raise self.error(
                f"{self.source} has format {found!r:.80}, this version of infovla-peft reads {newest}; "
                f"update infovla-peft{cure}"
            )

    def typed(self, value: Any, kind: type, where: str, *, optional: bool = False) -> Any:
        """`value` if it is of this very type (JSON's true is no number; an integer is one)."""
        if optional and value is None:
            return None
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds:
            self.fail(where, f"{'null or ' if optional else ''}{JSON_NAMES[kind]}", value)
        return value

    def count(self, value: Any, where: str, *, minimum: int = 0, maximum: int = 10**9) -> int:
        fits = minimum <= self.typed(value, int, where) <= maximum
        self.need(fits, where, f"from {minimum} to {maximum}", value)
        return int(value)

    def number(
        self, value: Any, where: str, low: float = -math.inf, high: float = math.inf, *, rounding: float = 0.0
    ) -> float:
        number = float(self.typed(value, float, where))
        fits = math.isfinite(number) and low - rounding <= number <= high + rounding
        self.need(fits, where, f"a number from {low:g} to {high:g}", value)
        return number

    def items(
        self, value: Any, where: str, length: int | None = None, *, each: str = "elements"
    ) -> list[tuple[str, Any]]:
        """The elements of an array, each with its place; `each` says what they are."""
        items = self.typed(value, list, where)
        self.need(length in (None, len(items)), where, f"an array of {length} {each}", len(items))
        return [(f"{where}[{index}]", item) for index, item in enumerate(items)]

    def texts(self, value: Any, where: str) -> list[str]:
        return [self.typed(item, str, place) for place, item in self.items(value, where)]

    def record(self, value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
        """An object with these keys and no others."""
        record: dict[str, Any] = self.typed(value, dict, where)
        missing = [key for key in keys if key not in record]
        strange = [f"{key!s:.40}" for key in record if key not in keys]
        wrong = [f"lacks {', '.join(missing)}"] if missing else []
        if strange:
            kind = "an unknown key" if len(strange) == 1 else "the unknown keys"
            wrong.append(f"has {kind} {', '.join(strange):.200}")
        if wrong:
            raise self.error(f"{self.source}: {where} {' and '.join(wrong)}; {self.cure}")
        return record

    def strings(self, value: Any, where: str) -> dict[str, str]:
        """An object whose values are strings."""
        return {
            key: self.typed(text, str, f"{where}[{key!r:.60}]") for key, text in self.typed(value, dict, where).items()
        }

    def path_inside(self, value: Any, where: str) -> str:
        """A path that stays inside the run's folder."""
        path = str(self.typed(value, str, where))
        self.need(is_inside(path), where, "a relative path inside the run's folder", path)
        return path
