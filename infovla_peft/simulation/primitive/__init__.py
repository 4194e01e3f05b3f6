"""Stand-ins for LIBERO's assets, built of MuJoCo primitives: same joints, sites, sizes and masses, no mesh.

The BDDL tasks, the initial states, the robot and the success predicates stay LIBERO's own. Shapes and colours are
ours; positions of sites, joints and ranges are LIBERO's interface. A policy or a demonstration belongs to one asset
set: the pictures differ, and so does the physics in detail.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ...files import atomic_folder
from ..headless import cache_folder
from .arenas import ARENAS, arena_xml
from .fixtures import FIXTURES
from .groceries import GROCERIES
from .kitchenware import KITCHENWARE
from .writer import thing_xml

__all__ = ["SUITES", "build_primitive_assets", "primitive_asset_files"]

SUITES = ("libero_goal", "libero_object", "libero_spatial", "libero_10")
"""The suites that every task of which can be built with these assets."""

_MARKER = "PRIMITIVE_ASSETS_VERSION"


def primitive_asset_files() -> dict[str, str]:
    """Path inside the folder -> XML text, for every file of the set. Equal on every machine."""
    files = {thing.file: thing_xml(thing) for thing in (*FIXTURES, *KITCHENWARE, *GROCERIES)}
    return files | {arena.file: arena_xml(arena) for arena in ARENAS}


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256("\0".join(f"{path}\0{text}" for path, text in sorted(files.items())).encode()).hexdigest()[
        :12
    ]


def build_primitive_assets(folder: str | os.PathLike[str] | None = None) -> Path:
    """Write the asset folder, unless it is there and up to date; return its absolute path.

    Args:
        folder: where to write. Default: `primitive-assets-<digest of the files>` in the package's cache folder, so
            that two versions of the package never write the same one.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: the folder cannot be written.
    """
    files = primitive_asset_files()
    digest = _digest(files)
    target = Path(folder or cache_folder() / f"primitive-assets-{digest}").resolve()
    marker = target / _MARKER

    def is_built() -> bool:
        return marker.is_file() and marker.read_text(encoding="utf-8").strip() == digest

    if is_built():
        return target
    if target.exists() and not marker.is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} is there and holds no primitive assets; name a new or an empty folder")
    try:
        with atomic_folder(target) as temporary:
            for path, text in {**files, _MARKER: f"{digest}\n"}.items():
                file = temporary / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
    except OSError:
        if not is_built():  # else another process was faster
            raise
    return target
