"""LIBERO's suites, tasks, step caps and benchmark start states, read from its package without a simulator."""

from __future__ import annotations

import ast
import difflib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..task_names import instruction_of
from .headless import libero_folder
from .start_states import read_states

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
    near = difflib.get_close_matches(word[:80], choices, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(repr(choice) for choice in near)}?" if near else f"choose one of {choices}"


@cache
def suite_tasks(suite: str) -> tuple[Task, ...]:
    """All tasks of a suite in LIBERO's order.

    Raises:
        ValueError: unknown suite.
        SimulatorNotFoundError: LIBERO is not installed.
    """
    if suite not in SUITES:
        raise ValueError(f"unknown suite {suite!r:.80}: {_closest(suite, list(SUITES))}")
    source = libero_folder() / "benchmark" / "libero_suite_task_map.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names: list[str] = next(
        ast.literal_eval(node.value)[suite]
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "libero_task_map"
    )
    folder = libero_folder() / "bddl_files" / suite
    return tuple(
        Task(suite, index, name, instruction_of(name), folder / f"{name}.bddl") for index, name in enumerate(names)
    )


def find_task(suite: str, task: int | str) -> Task:
    """A task by its index in the suite, its name, or its instruction.

    Raises:
        ValueError: unknown suite or task; the message lists near names.
    """
    tasks = suite_tasks(suite)
    if isinstance(task, int) or re.fullmatch("[0-9]+", task):
        if len(str(task)) > 9 or not 0 <= int(task) < len(tasks):
            raise ValueError(f"{suite} has tasks 0 to {len(tasks) - 1}, not {task!s:.80}")
        return tasks[int(task)]
    found = [candidate for candidate in tasks if task in (candidate.name, candidate.instruction)]
    if len(found) > 1:
        names = ", ".join(candidate.name for candidate in found)
        raise ValueError(f"{suite} has several tasks {task!r:.80}, in different scenes: say one of {names}")
    if found:
        return found[0]
    raise ValueError(f"{suite} has no task {task!r:.80}: {_closest(task, [candidate.name for candidate in tasks])}")


def initial_states(task: Task) -> NDArray[np.float64]:
    """The 50 benchmark start states of a task: time, joint positions, joint velocities; shape (50, 1 + nq + nv).

    They are the test set: demonstrations never start from them.

    Raises:
        ValueError: the file is not what LIBERO ships.
    """
    file = libero_folder() / "init_files" / task.suite / f"{task.name}.pruned_init"
    try:
        return read_states(file)
    except ValueError as error:
        raise ValueError(f"cannot read the start states in {file} ({error}): reinstall hf-libero") from error
