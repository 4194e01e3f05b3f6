"""The reference of rollouts: LIBERO's own environment in the caller's process, which renders on every step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..simulation import AssetSet, EnvironmentState, Task
from ..simulation.environment import NO_MOTION, SETTLING_STEPS
from ..simulation.headless import load_libero, quiet


def libero_environment(task: Task, assets: AssetSet, **options: Any) -> Any:
    """LIBERO's `ControlEnv` as it is: a reset parses the scene's XML again, a step renders what is asked for.

    Args:
        task, assets: as for `LiberoEnvironment`.
        options: of `ControlEnv`; without any it renders nothing.
    """
    load_libero()
    import libero.libero
    from libero.libero.envs.env_wrapper import ControlEnv

    libero.libero._assets_path_cache = str(assets.path)
    options = {"use_camera_obs": False, "has_offscreen_renderer": False, "hard_reset": True} | options
    with quiet():
        return ControlEnv(bddl_file_name=str(task.bddl_file), **options)


def begin_episode(
    environment: Any, start: NDArray[np.float64], fixtures: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    """Start an episode by LIBERO's own protocol, which ends with ten steps without motion.

    Args:
        environment: from `libero_environment`.
        start: state of the simulation, `EnvironmentState.simulation` or one of the benchmark's.
        fixtures: where they stand, `EnvironmentState.fixtures`; LIBERO would draw them.
        seed: of LIBERO's generator.

    Returns:
        LIBERO's last observation.
    """
    with quiet():
        environment.seed(seed)
        environment.reset()
        place_fixtures(environment, fixtures)
        environment.set_init_state(start)
        for _ in range(SETTLING_STEPS):
            observation = environment.step(NO_MOTION)[0]
    return dict(observation)


def place_fixtures(environment: Any, fixtures: NDArray[np.float64]) -> None:
    """Put the fixtures where `EnvironmentState.fixtures` says."""
    model = environment.sim.model._model
    bodies = [model.body(fixture.root_body).id for fixture in environment.env.fixtures]
    model.body_pos[bodies], model.body_quat[bodies] = fixtures[:, :3], fixtures[:, 3:]


class PlainLoop:
    """One LIBERO environment that renders two cameras, reflections and multisampling included, on every step.

    Args:
        task, assets: as for `LiberoEnvironment`.
        image_size: edge of the pictures in pixels.
        start: where the episode begins, from `LiberoEnvironment.start`.

    Attributes:
        states: of the simulation after each step.
    """

    def __init__(self, task: Task, assets: AssetSet, image_size: int, start: EnvironmentState) -> None:
        size = {"camera_heights": image_size, "camera_widths": image_size}
        cameras = ["agentview", "robot0_eye_in_hand"]
        self._environment = libero_environment(
            task, assets, use_camera_obs=True, has_offscreen_renderer=True, camera_names=cameras, **size
        )
        self._seen = begin_episode(self._environment, start.simulation, start.fixtures, seed=0)
        self.states: list[NDArray[np.float64]] = []

    def images(self) -> dict[str, NDArray[np.uint8]]:
        """What is seen, upright, by camera."""
        return {
            name.removesuffix("_image"): np.ascontiguousarray(picture[::-1, ::-1])
            for name, picture in self._seen.items()
            if name.endswith("_image")
        }

    def step(self, action: NDArray[np.float64]) -> None:
        """Execute an action (7,) and render."""
        self._seen = self._environment.step(action)[0]
        self.states.append(self._environment.get_sim_state())

    def close(self) -> None:
        self._environment.close()
