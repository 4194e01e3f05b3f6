"""Importing the simulation leaves nothing behind, and a broken environment is named with its cure."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infovla_peft.simulation import SimulatorNotFoundError, cache_folder, headless, installation
from infovla_peft.simulation.installation import Check


@pytest.mark.libero
def test_no_question_no_print_no_file_in_the_home(tmp_path: Path) -> None:
    code = """
from infovla_peft.simulation import LiberoEnvironment, find_assets, find_task
with LiberoEnvironment(find_task("libero_goal", 7), assets=find_assets("primitive"), image_size=16) as environment:
    environment.reset(seed=0)
    environment.observe()
"""
    numba = cache_folder() / "numba"  # compiled functions, lest this test waits for the compiler
    drop = ("INFOVLA_CACHE", "LIBERO_CONFIG_PATH", "MPLCONFIGDIR", "MUJOCO_GL", "PYOPENGL_PLATFORM")
    environment = {key: value for key, value in os.environ.items() if key not in drop and not key.startswith("XDG")}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"HOME": str(tmp_path), "NUMBA_CACHE_DIR": str(numba)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    written = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {(".cache", "infovla_peft")}


def test_missing_gl_library_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(SimulatorNotFoundError, match=r"no OpenGL library for MUJOCO_GL=osmesa.*apt-get.*libosmesa6"):
        headless.choose_gl()
    check = installation._check_gl()
    assert not check.ok
    assert "libosmesa6" in check.cure
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(SimulatorNotFoundError, match="osmesa or egl"):
        headless.choose_gl()


def test_setup_asks_an_administrator_for_gl(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def missing() -> str:
        if any("libosmesa6" in command for command in commands):
            return "osmesa"
        raise SimulatorNotFoundError("no OpenGL library")

    monkeypatch.setattr(installation, "_command", commands.append)
    monkeypatch.setattr(installation, "choose_gl", missing)
    monkeypatch.setattr(installation, "requires", lambda _: ["torch", "mujoco==3.3.2 ; extra == 'libero'"])
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(SimulatorNotFoundError):
        installation.setup_libero()
    assert commands[0][-1] == "mujoco==3.3.2"
    assert commands[1][-4:] == ["--no-deps", "hf-libero==0.1.4", "robosuite==1.4.0", "bddl==1.0.1"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(installation.shutil, "which", lambda name: f"/usr/bin/{name}")
    installation.setup_libero()
    assert commands[-1][:2] == ["apt-get", "install"]


def test_failed_command_shows_its_output() -> None:
    with pytest.raises(SimulatorNotFoundError, match=r"(?s)this command failed: .*no such package"):
        installation._command([sys.executable, "-c", "import sys; sys.exit('no such package')"])


def test_doctor_names_a_torchvision_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = installation._check_torchvision()
    assert not check.ok
    assert check.detail == "RuntimeError: operator torchvision::nms does not exist"
    assert check.cure.startswith("pip uninstall -y torchvision")


@pytest.mark.parametrize(
    ("name", "detail", "ok"),
    [("transformers", "5.22.1", False), ("transformers", "5.24.0", True), ("torch", "2.13.0+cpu", True),
     ("torch", "2.5.1+cu124", False), ("torch", "2.99.0", False)],
)  # fmt: skip
def test_doctor_knows_the_versions_that_the_package_takes(name: str, detail: str, ok: bool) -> None:
    check = installation._check_version(name, Check(name, True, detail), "the cure")
    assert check.ok == ok
    assert ok or (check.cure == "the cure" and f"{detail}, and {name}" in check.detail)
    assert installation._check_version(name, Check(name, False, "broken", "cure"), "").detail == "broken"


def test_doctor_needs_no_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, run from its source by PYTHONPATH."""

    def absent(name: str) -> list[str]:
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "requires", absent)
    check = Check("torch", True, "1.0")
    assert installation._check_version("torch", check, "the cure") == check


@pytest.mark.parametrize(("version", "ok"), [("3.3.2", True), ("2.3.7", True), ("3.3.7", False), ("3.10.0", False)])
def test_doctor_knows_the_mujoco_versions(version: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "version", lambda _: version)
    check = installation._check_mujoco()
    assert check.ok == ok
    assert version in check.detail
    assert check.cure == ("" if ok else "pip install mujoco==3.3.2")


def test_doctor_names_packages_assets_and_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise installation.PackageNotFoundError(name)

    monkeypatch.setattr(installation, "version", absent)
    missing = installation._check_package("robosuite")
    assert missing == Check("robosuite", False, "not installed", missing.cure)
    assert "infovla setup-libero" in missing.cure
    monkeypatch.setenv("INFOVLA_LIBERO_ASSETS", str(tmp_path))
    assert "INFOVLA_LIBERO_ASSETS" in installation._check_assets().cure
    (tmp_path / "file").touch()
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path / "file" / "cache"))
    assert "INFOVLA_CACHE" in installation._check_cache().cure


@pytest.mark.libero
def test_doctor_is_content_here() -> None:
    checks = {check.name: check for check in installation.doctor()}
    assert {"torch", "torchvision", "transformers", "hf-libero", "MuJoCo", "OpenGL", "LIBERO", "assets"} < set(checks)
    assert all(check.ok and not check.cure for check in checks.values()), checks
