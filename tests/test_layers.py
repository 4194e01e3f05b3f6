"""README's "How it is built" names every file, and what is lower in it imports what is higher, never the reverse."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "infovla_peft"
FOLDERS = {"models/openvla", "simulation", "data", "speed", "commands"}  # each one entry of the list


def picture() -> list[str]:
    """The entries from the highest to the lowest; a file named in brackets behind one comes right before it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("\ninfovla_peft/\n")[1].split("\nrecipes/")[0]
    entries = []
    for line in text.splitlines():
        if line.startswith("   "):  # goes on from the line above, or is inside a folder
            continue
        names = re.split(r"\s{2,}", line.strip())[0].split(", ")
        entries += [*re.findall(r"\((\w+)\.py\)", line), *(name.removesuffix(".py").rstrip("/") for name in names)]
    return entries


def entry(path: Path) -> str:
    name = path.relative_to(PACKAGE).as_posix().removesuffix(".py")
    return next((folder for folder in FOLDERS if name.startswith(folder)), name)


def imported(path: Path) -> Iterator[Path]:
    """The package's files that one of them imports, at its top or where it needs them; for types alone is left out."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            place = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in (place / alias.name for alias in node.names):
                for found in (target.with_suffix(".py"), place.with_suffix(".py"), place / "__init__.py"):
                    if found.is_file():
                        yield found
                        break


def test_every_file_is_in_the_picture() -> None:
    found = {entry(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "models/__init__"}
    assert found == set(picture())


def test_imports_go_one_way() -> None:
    place = {name: number for number, name in enumerate(picture())}
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {other.relative_to(PACKAGE)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for other in imported(path)
        if entry(path) in place and place.get(entry(other), -1) > place[entry(path)]
    }
    assert not wrong, wrong
