"""Damage for files: blind (bits, bytes, blocks) and knowing (values of JSON and YAML, headers of binary formats)."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

TRAP = "infovla_fuzz_trap"
"""A module that must never be imported: whoever imports it has carried out what a file said."""

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, "", " ",
    "0", "nan", "../../../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "a\0b", "\u202e", "é" * 200, "x" * 5000,
    "{}", "[]", [], {}, [[]], {"": None}, [0] * 300, {"a": {"b": {"c": {}}}}, "<script>alert(1)</script>",
    "{{ 7 * 7 }}", "${HOME}", "$(touch x)", "(a+)+$", f"__import__('{TRAP}')", TRAP, f"{TRAP}.spring",
    "\\ud800", "http://192.0.2.1/x", "\n", "%n%s%x", "9" * 400,
)  # fmt: skip
"""Values that a field may suddenly have."""

SNIPPETS: tuple[bytes, ...] = (
    b"NaN", b"Infinity", b"-1e999", b"1e999", b'"\\ud800"', b"9" * 5000, b"[" * 5000, b'{"a":' * 3000, b"\xff\xfe",
    b"\xef\xbb\xbf", b"\0", b'"seed": 1, "seed": 2,', b"null", b"true", b"{}", b"[]", b"-0", b"1_000", b"0x10",
    b"!!python/object/apply:" + TRAP.encode() + b".spring []\n",
    b"!!python/name:" + TRAP.encode() + b".spring\n", b"!!binary aGVsbG8=\n", b"&a [*a]", b"<<: *a\n", b"? [a]\n: 1\n",
    b"2020-99-99\n", b".nan\n", b".inf\n", b"190:20:30\n", b"---\n...\n", b"%YAML 9.9\n", b"\t",
    b"c" + TRAP.encode() + b"\nspring\n(tR.",
)  # fmt: skip
"""Bytes that a text may suddenly hold."""

Mutation = Callable[[bytes, random.Random], bytes]


def damage(content: bytes, name: str, random_: random.Random) -> bytes:
    """Another content for the file of this name."""
    known: list[Mutation] = [of_bytes]
    if name.endswith((".json", ".jsonl")):
        known += [of_json] * 3 + [of_text]
    elif name.endswith((".yaml", ".yml")):
        known += [of_yaml] * 2 + [of_text]
    elif name.endswith(".safetensors"):
        known += [of_safetensors] * 2
    elif not name.endswith(".txt"):
        known += [of_numbers]
    else:
        known += [of_text]
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        content = random_.choice(known)(content, random_)
    return content


def of_bytes(content: bytes, random_: random.Random) -> bytes:
    """Cut off, flipped, zeroed, doubled, moved, inserted."""
    if not content:
        return random_.randbytes(random_.randrange(64))
    start = random_.randrange(len(content))
    end = min(len(content), start + random_.choice((1, 2, 4, 16, 256, 4096)))
    flipped = bytearray(content)
    flipped[start] ^= 1 << random_.randrange(8)
    return random_.choice(
        (
            bytes(flipped),
            content[:start],
            content[start:],
            content[:start] + content[end:],
            content[:start] + bytes(end - start) + content[end:],
            content[:start] + random_.randbytes(end - start) + content[end:],
            content[:end] + content[start:],
            content[:start] + random_.choice(SNIPPETS) + content[start:],
            content + random_.randbytes(random_.randrange(64)),
            b"",
        )
    )


def of_text(content: bytes, random_: random.Random) -> bytes:
    """A hostile snippet at a place where a value begins or a line ends."""
    places = [position + 1 for position, byte in enumerate(content) if byte in b":,[ \n"] or [0]
    place = random_.choice(places)
    rest = place + random_.choice((0, 0, 1, 5))
    return content[:place] + random_.choice(SNIPPETS) + content[rest:]


def of_numbers(content: bytes, random_: random.Random) -> bytes:
    """A length or an offset, as binary formats have them at their beginning and end, of another size."""
    if len(content) < 16:
        return of_bytes(content, random_)
    near = random_.choice((0, max(0, len(content) - 256), 0, random_.randrange(len(content) - 8)))
    place = min(len(content) - 8, near + random_.randrange(200))
    width = random_.choice((2, 4, 8))
    value = random_.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
    number = (value % (1 << 8 * width)).to_bytes(width, "little")
    return content[:place] + number + content[place + width :]


def of_json(content: bytes, random_: random.Random) -> bytes:
    """A value exchanged, left out, repeated or nested; a key renamed, added or written twice."""
    try:
        text = json.dumps(of_value(json.loads(content), random_))
    except (ValueError, RecursionError):
        return of_bytes(content, random_)
    if random_.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = "{" + text[1:-1] + ", " + text[1:-1] + "}"  # every key twice
    return text.encode()


def of_yaml(content: bytes, random_: random.Random) -> bytes:
    """As `of_json` (JSON is YAML), or a bomb of aliases, or endless nesting."""
    import yaml

    if random_.random() < 0.1:
        levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 12))
        merged = "".join(f"m{i}: &m{i}\n  <<: [{', '.join([f'*m{i - 1}'] * 9)}]\n" for i in range(1, 12))
        bombs = (
            f"l0: &l0 [x]\n{levels}",
            f"m0: &m0 {{a: 1}}\n{merged}",
            "a: " + "[" * 3000,
            "a: &a [*a]",
            "- " * 2000,
        )
        return content + b"\n" + random_.choice(bombs).encode() + b"\n"
    if b"&" in content:  # a bomb already: PyYAML itself would go off
        return of_text(content, random_)
    try:
        value = yaml.safe_load(content)
        return json.dumps(of_value(value, random_), default=str).encode()
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError):
        return of_text(content, random_)


def of_safetensors(content: bytes, random_: random.Random) -> bytes:
    """The header's length, or a value in it: names, types, shapes, offsets, notes."""
    length = int.from_bytes(content[:8], "little")
    if length > len(content) or random_.random() < 0.2:
        return of_numbers(content, random_)
    header = of_json(content[8 : 8 + length], random_)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def of_value(value: Any, random_: random.Random) -> Any:
    """The value with one change somewhere in it."""
    value = copy.deepcopy(value)
    places = [(None, None), *_places(value)]
    parent, key = random_.choice(places)
    if parent is None:
        return random_.choice((random_.choice(HOSTILE), [value], {"content": value}))
    before = parent[key]
    kind = random_.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(random_.choice(HOSTILE))] = parent.pop(key)
    elif kind == 2:
        (parent.insert(key, before) if isinstance(parent, list) else parent.update({f"{key}_2": before}))
    elif kind == 3 and isinstance(before, (int, float)) and not isinstance(before, bool):
        parent[key] = random_.choice((-before, before + 1, before * 1000, float(before), str(before), before / 3))
    elif kind == 4:
        deep: Any = before
        for _ in range(random_.choice((1, 3, 70, 500))):
            deep = [deep]
        parent[key] = deep
    elif kind == 5:
        other_parent, other_key = random_.choice(places[1:])
        parent[key] = copy.deepcopy(other_parent[other_key])
    else:
        parent[key] = random_.choice(HOSTILE)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(places) < 2000:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else []
        places += [(parent, key) for key in keys]
        waiting += [parent[key] for key in keys if isinstance(parent[key], (dict, list))]
    return places
