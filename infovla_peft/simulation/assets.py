"""The two asset sets: LIBERO's own meshes and textures, and stand-ins built from MuJoCo primitives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..reading import read_yaml
from .headless import cache_folder, libero_folder

ASSET_SETS = ("auto", "official", "primitive")
HUB_REPOSITORY = "lerobot/libero-assets"
_FOLDERS = ("articulated_objects", "scenes", "stable_scanned_objects", "turbosquid_objects", "textures")


@dataclass(frozen=True)
class AssetSet:
    """A complete `assets` folder of LIBERO's layout.

    Attributes:
        name: "official" or "primitive"; written into every result, and never mixed within one stream.
        path: the folder.
    """

    name: str
    path: Path


def _complete(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in _FOLDERS)


def _known_official() -> Iterator[Path]:
    config = Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero") / "config.yaml"
    if config.is_file():
        cure = "correct it, or delete it: LIBERO's assets are then looked for elsewhere"
        settings = read_yaml(config, error=ValueError, cure=cure)
        if isinstance(settings, dict) and settings.get("assets"):
            yield Path(str(settings["assets"]))
    yield libero_folder() / "assets"
    yield Path.home() / ".cache" / "libero" / "assets"  # where LIBERO's own download puts them
    yield _downloads()


def _downloads() -> Path:
    return cache_folder() / "libero_assets"


def _download() -> Path:
    from huggingface_hub import snapshot_download

    folder = _downloads()
    partial = folder.with_name(f"{folder.name}.part")  # a broken download goes on there, and is never taken for whole
    try:
        snapshot_download(HUB_REPOSITORY, repo_type="dataset", local_dir=partial)
        partial.rename(folder)
    except Exception as error:  # the Hub client raises errors of many libraries
        raise FileNotFoundError(
            f"LIBERO's own assets are not on this machine and {HUB_REPOSITORY} could not be downloaded "
            f"({type(error).__name__}: {error}). Set INFOVLA_LIBERO_ASSETS to a folder that holds them, or use "
            "assets='primitive' (stand-ins built by this package)"
        ) from error
    return folder


def find_assets(
    requested: str = "auto", folder: str | os.PathLike[str] | None = None, *, fetch: bool = True
) -> AssetSet:
    """Find an asset set on this machine, build it (primitive) or download it (official).

    Official assets are looked for in: `folder`, `INFOVLA_LIBERO_ASSETS`, the folder of LIBERO's configuration,
    LIBERO's package, what LIBERO or this package downloaded before.

    Args:
        requested: "official", "primitive", or "auto": official if found without a download, else primitive.
        folder: official assets, or where the primitive ones are built (default: the cache folder).
        fetch: False = download and build nothing; the path is then where the assets will be.

    Raises:
        ValueError: unknown set.
        FileNotFoundError: the official assets are not where they were said to be, or cannot be downloaded.
    """
    if requested not in ASSET_SETS:
        raise ValueError(f"assets must be one of {ASSET_SETS}, not {requested!r}")
    if requested != "primitive":
        given = {"the configured folder": folder, "INFOVLA_LIBERO_ASSETS": os.environ.get("INFOVLA_LIBERO_ASSETS")}
        for source, path in given.items():
            if path:
                if not _complete(Path(path)):
                    raise FileNotFoundError(
                        f"{path} ({source}) holds no LIBERO assets: it must contain the folders {', '.join(_FOLDERS)}"
                    )
                return AssetSet("official", Path(path).resolve())
        for candidate in _known_official():
            if _complete(candidate):
                return AssetSet("official", candidate.resolve())
        if requested == "official":
            return AssetSet("official", _download().resolve() if fetch else _downloads())
    if not fetch:
        return AssetSet("primitive", Path(folder) if folder else cache_folder())
    from .primitive import build_primitive_assets

    return AssetSet("primitive", build_primitive_assets(folder))
