"""Import LIBERO and robosuite without questions, prints, warnings, or files outside of one named cache folder."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.util
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ..files import write_text

GL_PACKAGES = ("libosmesa6", "libegl1", "libgl1", "libgl1-mesa-dri", "libopengl0")
SETUP_HINT = "run `infovla setup-libero`"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "LP_NUM_THREADS": "0",
}
"""Environment of a worker process. With 1, Mesa (llvmpipe) would draw in a second thread, and each picture would wait
for it to be scheduled: on a busy machine three times the time; the pixels are the same."""


class SimulatorNotFoundError(RuntimeError):
    """LIBERO, robosuite, MuJoCo or an OpenGL library is missing; the message names the cure."""


def cache_folder() -> Path:
    """The one folder written outside of a run: `INFOVLA_CACHE`, default `~/.cache/infovla_peft`."""
    return Path(os.environ.get("INFOVLA_CACHE") or Path.home() / ".cache" / "infovla_peft")


def libero_folder() -> Path:
    """The installed package's folder with `bddl_files` and `init_files`; imports nothing.

    Raises:
        SimulatorNotFoundError: LIBERO is not installed.
    """
    specification = importlib.util.find_spec("libero")
    for location in (specification.submodule_search_locations or []) if specification else []:
        folder = Path(location) / "libero"
        if (folder / "bddl_files").is_dir():
            return folder
    raise SimulatorNotFoundError(f"LIBERO is not installed: {SETUP_HINT}")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what LIBERO and robosuite print, and the warnings of libraries we cannot change."""
    with open(os.devnull, "w") as sink, redirect_stdout(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def choose_gl() -> str:
    """Choose MuJoCo's OpenGL back end (`MUJOCO_GL`, else osmesa, else egl) and check that its library loads.

    Raises:
        SimulatorNotFoundError: no library could be loaded; the message names the apt packages.
    """
    if platform.system() != "Linux":
        return "cgl" if platform.system() == "Darwin" else "glfw"
    libraries = {"osmesa": ("libOSMesa.so.8", "OSMesa"), "egl": ("libEGL.so.1", "EGL")}
    wanted = os.environ.get("MUJOCO_GL", "").lower()
    if wanted and wanted not in libraries:
        return wanted
    for backend in (wanted,) if wanted else libraries:
        for library in (libraries[backend][0], ctypes.util.find_library(libraries[backend][1])):
            try:
                if library:
                    ctypes.CDLL(library)
                    return backend
            except OSError:
                continue
    raise SimulatorNotFoundError(
        f"no OpenGL library for MUJOCO_GL={wanted or 'osmesa or egl'}: {SETUP_HINT}, or as root: "
        f"apt-get install -y --no-install-recommends {' '.join(GL_PACKAGES)}"
    )


def _configure_libero() -> None:
    # LIBERO asks for a data set folder on standard input when its configuration file is missing.
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero")
    if (folder / "config.yaml").is_file():
        return
    folder, package = cache_folder() / "libero", libero_folder()
    paths = {
        "benchmark_root": package,
        "bddl_files": package / "bddl_files",
        "init_states": package / "init_files",
        "datasets": folder / "datasets",
        "assets": package / "assets",
    }
    text = "".join(f"{key}: {json.dumps(str(path))}\n" for key, path in paths.items())
    file = folder / "config.yaml"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text)
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)


def _configure_caches() -> None:
    # numba and matplotlib, imported by robosuite and LIBERO, would otherwise create folders of their own in the home.
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))
    if not (Path.home() / ".config" / "matplotlib").is_dir():
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder() / "matplotlib"))


def _configure_robosuite() -> None:
    # robosuite reads its private settings from this module, if there is one. Given in memory it neither warns that
    # it is missing nor opens a log file in /tmp that another user may own.
    specification = importlib.util.find_spec("robosuite")
    if specification is None or specification.origin is None:
        raise SimulatorNotFoundError(f"robosuite is not installed: {SETUP_HINT}")
    if not Path(specification.origin).with_name("macros_private.py").is_file():
        settings = ModuleType("robosuite.macros_private")
        settings.__dict__.update(CONSOLE_LOGGING_LEVEL="ERROR", FILE_LOGGING_LEVEL=None)
        sys.modules.setdefault(settings.__name__, settings)


@cache
def load_libero() -> None:
    """Prepare the process for LIBERO and import it; cheap when repeated.

    Sets, where unset, `MUJOCO_GL`, `PYOPENGL_PLATFORM`, `LIBERO_CONFIG_PATH`, `NUMBA_CACHE_DIR` and `MPLCONFIGDIR`.

    Raises:
        SimulatorNotFoundError: something is missing; the message names it and the cure.
    """
    libero_folder()
    backend = os.environ["MUJOCO_GL"] = choose_gl()
    if backend in ("osmesa", "egl"):
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    try:
        _configure_libero()
        _configure_caches()
        _configure_robosuite()
        with quiet():
            import_module("libero.libero.envs")
    except ImportError as error:
        raise SimulatorNotFoundError(f"cannot import LIBERO ({error}): {SETUP_HINT}") from error
