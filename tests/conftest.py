"""Shared helpers of the tests. Everything runs offline on a CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from local_hub import LocalHub

from infovla_peft.simulation.headless import SimulatorNotFoundError, choose_gl

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
with suppress(SimulatorNotFoundError):  # the tests that need one say so themselves
    os.environ.setdefault("MUJOCO_GL", choose_gl())
    os.environ.setdefault("PYOPENGL_PLATFORM", os.environ["MUJOCO_GL"])

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """Reference material outside the repository (golden outputs, LIBERO's own assets), or None."""
    folder = Path(os.environ.get("INFOVLA_SHARED", REPOSITORY.parent / "shared"))
    return folder if folder.is_dir() else None


def libero_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("libero", "robosuite", "mujoco"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_shared = pytest.mark.skip(reason="reference material not found (INFOVLA_SHARED or ../shared)")
    no_libero = pytest.mark.skip(reason="LIBERO is not installed: run `infovla setup-libero`")
    no_gpu = pytest.mark.skip(reason="no GPU")
    has_libero, has_shared = libero_installed(), shared_folder() is not None
    for item in items:
        if "shared" in item.keywords and not has_shared:
            item.add_marker(no_shared)
        if "libero" in item.keywords and not has_libero:
            item.add_marker(no_libero)
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("reference material not found (INFOVLA_SHARED or ../shared)")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub on this machine, and an empty cache; this process's client talks to it and is not signed in."""
    from huggingface_hub import constants

    with LocalHub() as running:
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # which remembers its first address
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running
