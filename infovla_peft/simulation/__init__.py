"""LIBERO: tasks, assets, environments and worker processes. Importing this takes no simulator."""

from .assets import ASSET_SETS, AssetSet, find_assets
from .environment import EnvironmentState, LiberoEnvironment, Observation
from .headless import SimulatorNotFoundError, cache_folder
from .installation import Check, doctor, setup_libero
from .suites import STEP_CAPS, SUITES, Task, find_task, initial_states, suite_tasks
from .workers import EnvironmentPool, Episode, EpisodeResult, WorkerError

__all__ = [
    "ASSET_SETS",
    "STEP_CAPS",
    "SUITES",
    "AssetSet",
    "Check",
    "EnvironmentPool",
    "EnvironmentState",
    "Episode",
    "EpisodeResult",
    "LiberoEnvironment",
    "Observation",
    "SimulatorNotFoundError",
    "Task",
    "WorkerError",
    "cache_folder",
    "doctor",
    "find_assets",
    "find_task",
    "initial_states",
    "setup_libero",
    "suite_tasks",
]
