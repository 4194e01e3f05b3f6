"""Install the simulation (`infovla setup-libero`) and say what is wrong with an environment (`infovla doctor`)."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from .assets import find_assets
from .headless import GL_PACKAGES, SETUP_HINT, SimulatorNotFoundError, cache_folder, choose_gl
from .jobs import NO_MORE_PATH, same_path

# Installed without their dependencies: hf-libero's are 80 packages for training, among them a torchvision that a CPU
# build of torch cannot load, after which `from transformers import AutoImageProcessor` fails.
PACKAGES = {"hf-libero": "0.1.4", "robosuite": "1.4.0", "bddl": "1.0.1"}
MUJOCO_VERSION = "3.3.2"
"""The newest MuJoCo whose LIBERO results are known; later ones change libero_spatial task 5."""


@dataclass(frozen=True)
class Check:
    """One line of `infovla doctor`.

    Attributes:
        name: what was looked at.
        ok: whether it works.
        detail: what was found.
        cure: what to do about it; empty if it works.
    """

    name: str
    ok: bool
    detail: str
    cure: str = ""


def setup_libero() -> None:
    """Install LIBERO, robosuite and bddl without their dependencies, what they really import, and an OpenGL library.

    OpenGL comes from apt and is installed only if none loads and this process may do so.

    Raises:
        SimulatorNotFoundError: pip or apt failed, or the OpenGL library must be installed by an administrator.
    """
    try:
        declared = requires("infovla-peft") or []
    except PackageNotFoundError as error:
        raise SimulatorNotFoundError("install this package itself first: pip install -e .[libero]") from error
    # The extra `libero` is the list of what the three import.
    needed = [re.split(r"\s*;", line)[0] for line in declared if re.search(r"extra == .libero.", line)]
    pinned = [f"{name}=={wanted}" for name, wanted in PACKAGES.items()]
    for arguments in (needed, ["--no-deps", *pinned]):
        _command([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])
    try:
        choose_gl()
    except SimulatorNotFoundError:
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise
        _command(["apt-get", "update", "-qq"])
        _command(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *GL_PACKAGES])
        choose_gl()


def doctor() -> list[Check]:
    """Look at everything that the simulation and the models need; takes some ten seconds, changes nothing."""
    checks: list[Callable[[], Check]] = [
        _check_python,
        _check_torch,
        _check_torchvision,
        _check_transformers,
        *(lambda name=name: _check_package(name) for name in PACKAGES),
        _check_mujoco,
        _check_gl,
        _check_libero,
        _check_assets,
        _check_cache,
    ]
    return [check() for check in checks]


def _command(command: list[str]) -> None:
    print("$", " ".join(command), flush=True)
    # Shown only if it fails: pip complains about the dependencies that are left out on purpose.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    run = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if run.returncode != 0:
        raise SimulatorNotFoundError(f"this command failed: {' '.join(command)}\n{run.stdout.strip()}")


def _check_python() -> Check:
    ok = (3, 10) <= sys.version_info < (3, 14)  # MuJoCo 3.3.2 has no wheel for later ones
    return Check("Python", ok, platform.python_version(), "" if ok else "use Python 3.10 to 3.13")


def _check_import(name: str, code: str, cure: str) -> Check:
    # In a process of its own: a failed import leaves half a package behind, and a broken library may crash.
    environment = os.environ | {"PYTHONPATH": same_path()}
    try:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"{NO_MORE_PATH}; {code}"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(name, False, "no answer within five minutes", cure)
    if run.returncode == 0:
        return Check(name, True, run.stdout.strip())
    lines = run.stderr.strip().splitlines()
    return Check(name, False, lines[-1] if lines else f"exit code {run.returncode}", cure)


def _check_torch() -> Check:
    cure = f"pip install '{_needed('torch')}'"
    return _check_version("torch", _check_import("torch", "import torch; print(torch.__version__)", cure), cure)


def _check_version(name: str, check: Check, cure: str) -> Check:
    """The check, failed if the version that it found is none that the package is made for."""
    if not check.ok or _needed(name).specifier.contains(check.detail.split("+")[0], prereleases=True):
        return check
    return Check(name, False, f"{check.detail}, and {_needed(name)} is needed", cure)


def _needed(name: str) -> Requirement:
    """What the package says of its own dependency."""
    try:
        found = [Requirement(each) for each in requires("infovla_peft") or []]
    except PackageNotFoundError:  # run from its source, not installed: any version may do
        found = []
    return next((each for each in found if each.name == name and each.marker is None), Requirement(name))


def _check_torchvision() -> Check:
    name = "torchvision"
    if importlib.util.find_spec("torchvision") is None:
        return Check(name, True, "not installed; nothing here needs it")
    cure = (
        "pip uninstall -y torchvision (nothing here needs it; hf-libero's dependencies bring one that this torch "
        "cannot load, and then transformers' image processors fail)"
    )
    return _check_import(name, "import torchvision; print(torchvision.__version__)", cure)


def _check_transformers() -> Check:
    code = "import transformers; from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer; "
    cure = f"pip install '{_needed('transformers')}'; if a line above names torchvision, cure that first"
    check = _check_import("transformers", code + "print(transformers.__version__)", cure)
    return _check_version("transformers", check, cure)


def _check_package(name: str) -> Check:
    cure = f"{SETUP_HINT}, or: pip install --no-deps {name}=={PACKAGES[name]}"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(name, False, "not installed", cure)
    ok = found == PACKAGES[name]
    return Check(name, ok, found if ok else f"{found}, but {PACKAGES[name]} is the tested one", "" if ok else cure)


def _check_mujoco() -> Check:
    cure = f"pip install mujoco=={MUJOCO_VERSION}"
    try:
        found = version("mujoco")
    except PackageNotFoundError:
        return Check("MuJoCo", False, "not installed", cure)
    numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (found, MUJOCO_VERSION)]
    if numbers[0] > numbers[1]:
        detail = f"{found}; above {MUJOCO_VERSION} LIBERO's results differ from the published ones"
        return Check("MuJoCo", False, detail, cure)
    return Check("MuJoCo", True, found)


def _check_gl() -> Check:
    try:
        backend = choose_gl()
    except SimulatorNotFoundError as error:
        detail, _, cure = str(error).partition(": ")
        return Check("OpenGL", False, detail, cure)
    code = f"""
import os
os.environ.update(MUJOCO_GL={backend!r}, PYOPENGL_PLATFORM={backend!r})
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.render()
print("MUJOCO_GL={backend}")
"""
    packages = " ".join(GL_PACKAGES)
    cure = f"apt-get install -y --no-install-recommends {packages}; without a GPU set MUJOCO_GL=osmesa"
    return _check_import("OpenGL", code, cure)


def _check_libero() -> Check:
    code = "from infovla_peft.simulation.headless import load_libero; load_libero(); print('imports')"
    return _check_import("LIBERO", code, f"{SETUP_HINT}; it installs what the last line of the error says is missing")


def _check_assets() -> Check:
    try:
        assets = find_assets()
    except (OSError, ValueError, SimulatorNotFoundError) as error:
        cure = "unset INFOVLA_LIBERO_ASSETS or point it to LIBERO's assets; " + SETUP_HINT
        return Check("assets", False, str(error), cure)
    official = "" if assets.name == "official" else " (no official ones found: INFOVLA_LIBERO_ASSETS names a folder)"
    return Check("assets", True, f"{assets.name} in {assets.path}{official}")


def _check_cache() -> Check:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("cache folder", False, str(error), "set INFOVLA_CACHE to a folder that can be written")
    return Check("cache folder", True, str(folder))
