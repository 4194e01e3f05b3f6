"""LIBERO's suites, tasks, step caps and benchmark start states, read from its package without a simulator."""

from __future__ import annotations

import ast
import codecs
import difflib
import pickle
import re
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .headless import libero_folder

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
STEP_CAPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Longest episode in control steps (20 Hz), the ten settling steps not counted; OpenVLA's evaluation protocol."""


@dataclass(frozen=True)
class Task:
    """One task of a LIBERO suite.

    Attributes:
        suite: e.g. "libero_goal".
        index: position in the suite, from 0, in LIBERO's default order.
        name: LIBERO's file name without suffix, e.g. "turn_on_the_stove".
        instruction: what the policy is told; LIBERO derives it from the file name.
        bddl_file: scene, regions and goal.
    """

    suite: str
    index: int
    name: str
    instruction: str
    bddl_file: Path

    @property
    def max_steps(self) -> int:
        return STEP_CAPS[self.suite]

    def __str__(self) -> str:
        return f"{self.suite}/{self.name}"


def _closest(word: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(repr(choice) for choice in near)}?" if near else f"choose one of {choices}"


@cache
def suite_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite in LIBERO's order.

    Raises:
        ValueError: unknown suite.
        SimulatorNotFoundError: LIBERO is not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r}: {_closest(suite, list(SUITES))}")
    source = libero_folder() / "benchmark" / "libero_suite_task_map.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names: list[str] = next(
        ast.literal_eval(node.value)[suite]
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "libero_task_map"
    )
    folder = libero_folder() / "bddl_files" / suite
    return tuple(
        Task(suite, index, name, re.sub(r"^[A-Z_]+SCENE\d+_", "", name).replace("_", " "), folder / f"{name}.bddl")
        for index, name in enumerate(names)
    )


def find_task(suite: str, task: int | str) -> Task:
    """A task by its index in the suite, its name, or its instruction.

    Raises:
        ValueError: unknown suite or task; the message lists near names.
    """
    tasks = suite_tasks(suite)
    if isinstance(task, int) or task.isdecimal():
        if not 0 <= int(task) < len(tasks):
            raise ValueError(f"{suite} has tasks 0 to {len(tasks) - 1}, not {task}")
        return tasks[int(task)]
    for candidate in tasks:
        if task in (candidate.name, candidate.instruction):
            return candidate
    raise ValueError(f"{suite} has no task {task!r}: {_closest(task, [candidate.name for candidate in tasks])}")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and nothing else: what `torch.load(weights_only=True)` does, without torch."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of start states") from None


def initial_states(task: Task) -> NDArray[np.float64]:
    """The 50 benchmark start states of a task: time, joint positions, joint velocities; shape (50, 1 + nq + nv).

    They are the test set: demonstrations never start from them.

    Raises:
        ValueError: the file is not what LIBERO ships.
    """
    file = libero_folder() / "init_files" / task.suite / f"{task.name}.pruned_init"
    try:
        with zipfile.ZipFile(file) as archive, archive.open("archive/data.pkl") as data:
            states = _ArrayUnpickler(data).load()
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"cannot read the start states in {file} ({error}): reinstall hf-libero") from error
    if not isinstance(states, np.ndarray) or states.ndim != 2 or states.dtype != np.float64:
        raise ValueError(f"{file} holds no table of start states: reinstall hf-libero")
    return states
