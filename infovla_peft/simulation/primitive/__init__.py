"""Stand-ins for LIBERO's assets, built of MuJoCo primitives: same joints, sites, sizes and masses, no mesh.

The BDDL tasks, the initial states, the robot and the success predicates stay LIBERO's own. Shapes and colours are
ours; positions of sites, joints and ranges are LIBERO's interface. A policy or a demonstration belongs to one asset
set: the pictures differ, and so does the physics in detail.
"""

from __future__ import annotations

import os
from pathlib import Path

from infovla_peft.files import atomic_folder
from infovla_peft.simulation.primitive.arenas import ARENAS
from infovla_peft.simulation.primitive.fixtures import FIXTURES
from infovla_peft.simulation.primitive.objects import OBJECTS
from infovla_peft.simulation.primitive.writer import thing_xml

__all__ = ["VERSION", "build_primitive_assets", "primitive_asset_files"]

VERSION = 1
"""Raised with every change of the files, so that a cached folder is never stale."""

_MARKER = "PRIMITIVE_ASSETS_VERSION"


def primitive_asset_files() -> dict[str, str]:
    """Path inside the folder -> XML text, for every file of the set. Equal on every machine."""
    files = {thing.file: thing_xml(thing) for thing in (*FIXTURES, *OBJECTS)}
    files |= {path: arena() for path, arena in ARENAS.items()}
    return files


def build_primitive_assets(folder: str | os.PathLike[str] | None = None) -> Path:
    """Write the asset folder if it is not there yet; return its absolute path.

    Args:
        folder: where to write. Default: `primitive-assets-v<VERSION>` in the package's cache, that is
            `INFOVLA_CACHE` or `~/.cache/infovla_peft`.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: the folder cannot be written.
    """
    if folder is None:
        cache = os.environ.get("INFOVLA_CACHE") or Path.home() / ".cache" / "infovla_peft"
        folder = Path(cache) / f"primitive-assets-v{VERSION}"
    target = Path(folder).resolve()
    marker = f"{VERSION}\n"
    if (target / _MARKER).is_file():
        if (target / _MARKER).read_text(encoding="utf-8") == marker:
            return target
    elif target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and holds no primitive assets; name another or an empty folder")
    with atomic_folder(target) as temporary:
        for path, text in {**primitive_asset_files(), _MARKER: marker}.items():
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return target
