"""LIBERO: tasks, assets, environments and worker processes. Importing this takes no simulator."""

from .assets import ASSET_SETS, AssetSet, find_assets
from .environment import EnvironmentState, LiberoEnvironment, Observation
from .headless import SimulatorNotFoundError, cache_folder
from .suites import STEP_CAPS, SUITES, Task, find_task, initial_states, suite_tasks

__all__ = [
    "ASSET_SETS",
    "STEP_CAPS",
    "SUITES",
    "AssetSet",
    "EnvironmentState",
    "LiberoEnvironment",
    "Observation",
    "SimulatorNotFoundError",
    "Task",
    "cache_folder",
    "find_assets",
    "find_task",
    "initial_states",
    "suite_tasks",
]
