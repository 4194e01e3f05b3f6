"""LIBERO's names of tasks, and the instructions they stand for."""

from __future__ import annotations

import re

SCENE = r"^[A-Z_]+SCENE\d+_"
"""The start of LIBERO's name of a task that is one of several scenes."""


def instruction_of(task: str) -> str:
    """The instruction of a task given by LIBERO's name of it.

    >>> instruction_of("KITCHEN_SCENE3_turn_on_the_stove")
    'turn on the stove'
    """
    return re.sub(SCENE, "", task).replace("_", " ")


def same_task(given: str, name: str) -> bool:
    """Whether `given` is the name or the instruction of the task called `name`."""
    return given == name or given.lower().replace("_", " ") == instruction_of(name).lower()
