"""One LIBERO task as an environment: seeded soft resets, physics-only steps, pictures only when asked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .assets import AssetSet
from .headless import load_libero, quiet
from .physics import ControlStep
from .rendering import RENDERERS, SceneRenderer
from .suites import Task, initial_states

SETTLING_STEPS = 10
"""Steps without motion after a reset, in which the objects come to rest; OpenVLA's evaluation protocol."""
NO_MOTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
START_NOISE = 0.02
"""Standard deviation (rad) of the arm joints at the start of a fresh layout; robosuite's default. It moves the hand
by about 1 cm, as in the benchmark's start states."""


@dataclass(frozen=True)
class Observation:
    """What the robot perceives now.

    Attributes:
        images: camera name -> uint8 RGB (H, W, 3), upright (LIBERO's frame turned by 180 degrees).
        state: proprioception, float32 (8,): hand position (m), its rotation as axis times angle (rad), the two
            finger positions (m).
    """

    images: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32]


@dataclass(frozen=True)
class EnvironmentState:
    """Where everything stands.

    Attributes:
        simulation: float64 (1 + nq + nv,): time, joint positions, joint velocities, as in the benchmark's files.
        fixtures: float64 (fixtures, 7): position and quaternion (w, x, y, z) of each fixture (cabinet, stove, rack).
            LIBERO moves them at every reset by about 1 cm, in the model, so that `simulation` does not hold them.
    """

    simulation: NDArray[np.float64]
    fixtures: NDArray[np.float64]


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    # robosuite and LIBERO draw from NumPy's global generator, which belongs to the caller.
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _build(task: Task, assets: AssetSet) -> Any:
    load_libero()
    import libero.libero
    import mujoco
    import robosuite
    from libero.libero.envs import TASK_MAPPING
    from libero.libero.envs.bddl_utils import get_problem_info
    from robosuite.environments.base import REGISTERED_ENVS

    libero.libero._assets_path_cache = str(assets.path)
    problem = TASK_MAPPING[get_problem_info(str(task.bddl_file))["problem_name"]]

    class Problem(problem):  # type: ignore[misc, valid-type]
        def _initialize_sim(self, xml_string: str | None = None) -> None:
            super()._initialize_sim(xml_string)
            # Fixtures are placed by overwriting these; a reset must start from the model as it was built.
            model = self.sim.model._model
            self.built_poses = model.body_pos.copy(), model.body_quat.copy()

        def _reset_internal(self) -> None:
            # A hard reset has run this once on the new model; the solver's next solutions start from its result.
            self.sim.forward()
            super()._reset_internal()

        def _setup_observables(self) -> dict[str, Any]:
            return {}  # robosuite would compute them in every substep

    del REGISTERED_ENVS["Problem"]  # robosuite registers every subclass
    Problem.__name__ = problem.__name__  # LIBERO compares it with the name in the BDDL file
    try:
        with quiet(), _numpy_seed(0):  # building ends with a reset
            return Problem(
                str(task.bddl_file),
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                use_camera_obs=False,
                has_offscreen_renderer=False,
                control_freq=20,
                ignore_done=True,
                hard_reset=False,
            )
    except (OSError, ValueError, KeyError, AssertionError, mujoco.FatalError) as error:
        raise RuntimeError(
            f"cannot build {task} with the {assets.name} assets in {assets.path} ({error}): the files of this task "
            "are missing or broken; choose another asset set or give a complete folder by INFOVLA_LIBERO_ASSETS"
        ) from error


class LiberoEnvironment:
    """A LIBERO task with a Panda arm at 20 Hz.

    The physics is LIBERO's own: for the same start, fixtures and actions every state equals that of LIBERO's
    environment after a hard reset, to the last bit. Nothing is rendered before `observe`.

    Args:
        task: from `suite_tasks` or `find_task`.
        assets: from `find_assets`.
        image_size: edge of the square pictures in pixels.
        cameras: names of the model's cameras that `observe` renders; LIBERO's are "agentview" and
            "robot0_eye_in_hand".
        renderer: "fast" (no reflections, no multisampling, a coarser arm) or "exact" (LIBERO's own pictures).

    Raises:
        ValueError: unknown renderer or camera.
        SimulatorNotFoundError: the simulator or an OpenGL library is missing.
        RuntimeError: the task cannot be built from these assets.

    Example:
        >>> environment = LiberoEnvironment(find_task("libero_goal", 7), assets=find_assets())  # doctest: +SKIP
        >>> environment.reset(initial_state=0, seed=0)  # doctest: +SKIP
        >>> environment.step(np.zeros(7))  # doctest: +SKIP
        False
    """

    def __init__(
        self,
        task: Task,
        *,
        assets: AssetSet,
        image_size: int = 128,
        cameras: Sequence[str] = ("agentview",),
        renderer: str = "fast",
    ) -> None:
        if renderer not in RENDERERS:
            raise ValueError(f"renderer must be one of {RENDERERS}, not {renderer!r}")
        self.task, self.assets = task, assets
        self.image_size, self.cameras, self.renderer = image_size, tuple(cameras), renderer
        self.env = _build(task, assets)
        """The robosuite environment, for code that reads the simulator's truth."""
        self._control = ControlStep(self.env)
        self._model, self._data = self.env.sim.model._model, self.env.sim.data._data
        self._fixture_bodies = [self._model.body(fixture.root_body).id for fixture in self.env.fixtures]
        self._start: EnvironmentState | None = None
        self._scene: SceneRenderer | None = None
        known = self.env.sim.model.camera_names
        if unknown := [camera for camera in self.cameras if camera not in known]:
            self.close()
            raise ValueError(f"unknown cameras {unknown}: this scene has {sorted(known)}")

    @property
    def instruction(self) -> str:
        return self.task.instruction

    @property
    def max_steps(self) -> int:
        return self.task.max_steps

    @property
    def start(self) -> EnvironmentState:
        """Where the running episode started, before the settling steps; `reset` accepts it for a replay."""
        if self._start is None:
            raise RuntimeError("the environment has not been reset yet: call reset(seed=...) first")
        return self._start

    def reset(self, *, initial_state: int | NDArray[np.float64] | EnvironmentState | None = None, seed: int) -> None:
        """Start an episode, including ten settling steps; a pure function of its arguments.

        Args:
            initial_state: index of one of the 50 benchmark states, a flat state like them, a whole
                `EnvironmentState` (fixtures included), or None: a fresh layout drawn from the regions of the BDDL
                file, with noise on the arm's joints.
            seed: 0 to 2**32 - 1; decides the layout and where the fixtures stand. Not used with a whole state.

        Raises:
            IndexError: no such benchmark state.
            ValueError: the state belongs to another task.
        """
        if isinstance(initial_state, int):
            states = initial_states(self.task)
            if not 0 <= initial_state < len(states):
                raise IndexError(f"{self.task} has start states 0 to {len(states) - 1}, not {initial_state}")
            initial_state = states[initial_state]
        with _numpy_seed(seed):
            if initial_state is None:
                # Noise in the episode's own reset would also move the posture the controller pulls towards.
                self._soft_reset(START_NOISE)
                initial_state = self.state()
            self._soft_reset(0.0)
        if not isinstance(initial_state, EnvironmentState):
            initial_state = EnvironmentState(np.asarray(initial_state), self._fixtures())
        self._place(initial_state)
        self._start = self.state()
        for _ in range(SETTLING_STEPS):
            self._control(NO_MOTION)

    def step(self, action: NDArray[np.floating[Any]] | Sequence[float]) -> bool:
        """Execute one action for 50 ms; returns whether the goal holds. Renders nothing.

        Args:
            action: (7,): hand motion in [-1, 1] (1 = 0.05 m, 0.5 rad), gripper -1 open, +1 close.

        Raises:
            ValueError: another shape, or not finite.
            RuntimeError: not reset yet.
        """
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"an action is seven finite numbers, not {action}")
        if self._start is None:
            raise RuntimeError("the environment has not been reset yet: call reset(seed=...) first")
        self._control(action)
        return self.success()

    def success(self) -> bool:
        """Whether the goal of the BDDL file holds."""
        return bool(self.env._check_success())

    def observe(self) -> Observation:
        """Render the cameras and read the proprioception, both of the current state."""
        if self._scene is None:
            self._scene = SceneRenderer(self._model, self._data, self.image_size, self.renderer)
        self._update_poses()
        self.env._post_process()  # e.g. the flame of a stove that is on
        return Observation({camera: self._scene.render(camera) for camera in self.cameras}, self._proprioception())

    def proprioception(self) -> NDArray[np.float32]:
        """`Observation.state` without rendering."""
        self._update_poses()
        return self._proprioception()

    def state(self) -> EnvironmentState:
        """A copy of where everything stands."""
        return EnvironmentState(self.env.sim.get_state().flatten(), self._fixtures())

    def set_state(self, state: EnvironmentState) -> None:
        """Put everything where `state` says, e.g. to look at it; the gripper's command starts anew."""
        self._place(state)

    def close(self) -> None:
        """Release the model and the renderer."""
        if self._scene is not None:
            self._scene.close()
            self._scene = None
        if self.env is not None:
            self.env.close()
            del self.env, self._control, self._model, self._data
            self.env = None
            gc.collect()  # robosuite's objects refer to each other

    def __enter__(self) -> LiberoEnvironment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _soft_reset(self, arm_noise: float) -> None:
        from robosuite.utils.errors import RandomizationError

        self.env.robots[0].initialization_noise["magnitude"] = arm_noise
        for _ in range(100):
            self._model.body_pos[:], self._model.body_quat[:] = self.env.built_poses
            try:
                self.env.reset()
                break
            except RandomizationError:
                continue  # the objects did not fit; the generator has moved on
        else:
            raise RuntimeError(f"{self.task}: no layout without overlapping objects in 100 draws")
        self._control.attach()

    def _place(self, state: EnvironmentState) -> None:
        expected = 1 + self._model.nq + self._model.nv
        if state.simulation.shape != (expected,) or state.fixtures.shape != (len(self._fixture_bodies), 7):
            raise ValueError(
                f"{self.task} has states of shape ({expected},) and {len(self._fixture_bodies)} fixtures, "
                f"not {state.simulation.shape} and {state.fixtures.shape[0]}"
            )
        self._model.body_pos[self._fixture_bodies] = state.fixtures[:, :3]
        self._model.body_quat[self._fixture_bodies] = state.fixtures[:, 3:]
        self.env.sim.set_state_from_flattened(state.simulation)
        self.env.sim.forward()
        # The gripper integrates its commands; what the last episode left would survive a soft reset.
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)

    def _fixtures(self) -> NDArray[np.float64]:
        bodies = self._fixture_bodies
        return np.concatenate([self._model.body_pos[bodies], self._model.body_quat[bodies]], axis=1)

    def _update_poses(self) -> None:
        # A step ends with the poses its last substep started from.
        import mujoco

        mujoco.mj_kinematics(self._model, self._data)
        mujoco.mj_comPos(self._model, self._data)
        mujoco.mj_camlight(self._model, self._data)

    def _proprioception(self) -> NDArray[np.float32]:
        robot = self.env.robots[0]
        position = self._data.site_xpos[robot.eef_site_id]
        w, *axis = self._data.body(robot.robot_model.eef_name).xquat
        sine = np.sqrt(max(0.0, 1.0 - w * w))
        rotation = np.array(axis) * (2.0 * np.arccos(np.clip(w, -1.0, 1.0)) / sine if sine > 1e-8 else 0.0)
        fingers = self._data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, rotation, fingers]).astype(np.float32)
