"""The recipes as files: where they are, in a checkout as in an installed wheel, and copies of them to change."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from .files import write_text


def recipes_folder() -> Path:
    """The folder `recipes`: inside the package if it was installed as a wheel, else beside it.

    Raises:
        FileNotFoundError: neither; the package was copied without them.
    """
    package = Path(str(files("infovla_peft")))
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "continual.py").is_file():
            return folder
    raise FileNotFoundError(f"no recipes beside {package}: install the package again (pip install infovla-peft)")


def list_recipes() -> dict[str, Path]:
    """Every recipe by its name: scripts, configurations (of `bench/x.yaml` the name is `bench/x`), `accelerate/*`.

    The shell scripts set a checkout up, and are of no use without one.
    """
    folder = recipes_folder()
    found = {path.stem: path for path in sorted(folder.glob("*.py"))}
    for path in sorted((folder / "configs").rglob("*.yaml")):
        found[path.relative_to(folder / "configs").with_suffix("").as_posix()] = path
    for path in sorted((folder / "accelerate").glob("*.yaml")):
        found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def copy_recipe(name: str, target: str | Path = ".", *, overwrite: bool = False) -> Path:
    """Copy a recipe, to read and to change.

    Args:
        name: of `list_recipes`, with or without its suffix.
        target: a folder, or the file to write.
        overwrite: replace a file that is there.

    Returns:
        The copy.

    Raises:
        ValueError: no such recipe.
        FileExistsError: the target exists.
    """
    known = list_recipes()
    by_file = {path.name: path for path in known.values()}
    source = known.get(name) or by_file.get(name) or known.get(name.removesuffix(".yaml"))
    if source is None:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(known)}")
    path = Path(target)
    if path.is_dir() or not path.suffix:
        path = path / source.name
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name, or add --force to replace it")
    write_text(path, source.read_text(encoding="utf-8"))
    path.chmod(source.stat().st_mode & 0o777 | 0o600)
    return path
