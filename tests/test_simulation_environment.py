"""The environment against LIBERO's own: states to the last bit, pictures to the last level."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infovla_peft.simulation import AssetSet, LiberoEnvironment, find_assets, find_task
from infovla_peft.simulation.environment import EnvironmentState
from infovla_peft.simulation.headless import quiet
from infovla_peft.simulation.suites import initial_states
from infovla_peft.speed.plain_loop import begin_episode, libero_environment, place_fixtures

pytestmark = pytest.mark.libero
CAMERAS = ("agentview", "robot0_eye_in_hand")


@pytest.fixture(scope="module")
def primitive() -> AssetSet:
    return find_assets("primitive")


@pytest.fixture(scope="module")
def environment(primitive: AssetSet) -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(find_task("libero_goal", 7), assets=primitive, cameras=CAMERAS, image_size=96) as made:
        yield made


def begin(reference: Any, environment: LiberoEnvironment, state: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Bring LIBERO's environment to where ours started, by its own protocol; returns the last observation."""
    return begin_episode(reference, state, environment.start.fixtures, seed)


def random_actions(seed: int, count: int) -> np.ndarray:
    actions = np.random.default_rng(seed).uniform(-1, 1, (count, 7))
    actions[::4, 3:6] = 0  # without rotation the controller keeps its last goal
    return actions


@pytest.mark.parametrize(("suite", "index"), [("libero_goal", 7), ("libero_goal", 3), ("libero_object", 2)])
def test_states_equal_a_hard_reset_exactly(suite: str, index: int, primitive: AssetSet) -> None:
    task = find_task(suite, index)
    reference = libero_environment(task, primitive)
    with LiberoEnvironment(task, assets=primitive, image_size=16) as environment:
        for episode, start in enumerate((4, 11)):
            state = initial_states(task)[start]
            environment.reset(initial_state=start, seed=episode)
            begin(reference, environment, state, episode)
            for count, action in enumerate(random_actions(episode, 25)):
                success = environment.step(action)
                assert success == reference.step(action)[2]
                np.testing.assert_array_equal(environment.state().simulation, reference.get_sim_state())
                if count == 10:
                    environment.observe()  # looking changes nothing
    reference.close()


@pytest.mark.shared
@pytest.mark.parametrize(
    ("suite", "index"), [("libero_spatial", 0), ("libero_spatial", 4), ("libero_10", 3), ("libero_10", 9)]
)
def test_states_equal_a_hard_reset_exactly_with_official_assets(suite: str, index: int, shared: Path) -> None:
    task, assets = find_task(suite, index), find_assets("official", shared / "libero" / "assets")
    reference = libero_environment(task, assets)
    with LiberoEnvironment(task, assets=assets) as environment:
        for episode in range(3):
            environment.reset(initial_state=episode, seed=episode)
            begin(reference, environment, initial_states(task)[episode], episode)
            for action in random_actions(episode, 40):
                assert environment.step(action) == reference.step(action)[2]
            np.testing.assert_array_equal(environment.state().simulation, reference.get_sim_state())
    reference.close()


@pytest.mark.shared
def test_published_observation(shared: Path) -> None:
    # OpenVLA-OFT publishes this proprioception for libero_spatial, task 0, start state 0, ten steps without motion.
    published = [
        *(-0.21124162683394807, -0.011090601889321502, 1.1742495176982402),
        *(3.140895396142254, -0.002847819833825949, -0.08773931027790592),
        *(0.03872336505859045, -0.0387222020954563),
    ]
    task, assets = find_task("libero_spatial", 0), find_assets("official", shared / "libero" / "assets")
    reference = libero_environment(task, assets)
    from robosuite.utils.transform_utils import quat2axisangle

    with LiberoEnvironment(task, assets=assets) as environment:
        environment.reset(initial_state=0, seed=0)
        seen = begin(reference, environment, initial_states(task)[0], 0)
        rotation = quat2axisangle(seen["robot0_eef_quat"].copy())
        state = np.concatenate([seen["robot0_eef_pos"], rotation, seen["robot0_gripper_qpos"]])
        np.testing.assert_allclose(state, published, rtol=0, atol=5e-9)
        np.testing.assert_array_equal(environment.state().simulation, reference.get_sim_state())
        # LIBERO samples one or two substeps (2 ms) before the end of the control step, we at its end.
        np.testing.assert_allclose(environment.proprioception(), published, rtol=0, atol=1e-4)
    reference.close()


def test_exact_pictures_are_those_of_libero(primitive: AssetSet) -> None:
    task = find_task("libero_goal", 7)
    options = {"use_camera_obs": True, "has_offscreen_renderer": True, "camera_heights": 64, "camera_widths": 64}
    reference = libero_environment(task, primitive, hard_reset=False, **options)
    with quiet():
        reference.reset()
    with LiberoEnvironment(task, assets=primitive, cameras=CAMERAS, image_size=64, renderer="exact") as environment:
        environment.reset(initial_state=0, seed=0)
        for action in random_actions(0, 10):
            environment.step(action)
        observation = environment.observe()
        reference.sim._render_context_offscreen.gl_ctx.make_current()
        place_fixtures(reference, environment.start.fixtures)
        seen = reference.set_init_state(environment.state().simulation)
        for camera in CAMERAS:
            np.testing.assert_array_equal(observation.images[camera], seen[f"{camera}_image"][::-1, ::-1])
        np.testing.assert_allclose(observation.state[:3], seen["robot0_eef_pos"], rtol=0, atol=1e-6)
        reference.close()  # robosuite frees its objects in the current context, which must be its own
        del reference
        gc.collect()


def test_fast_pictures_differ_in_small_details_only(environment: LiberoEnvironment, primitive: AssetSet) -> None:
    environment.reset(initial_state=0, seed=0)
    fast, state = environment.observe(), environment.state()
    names = [environment._model.mesh(index).name for index in range(environment._model.nmesh)]
    with LiberoEnvironment(
        environment.task, assets=primitive, cameras=CAMERAS, image_size=96, renderer="exact"
    ) as same:
        same.reset(initial_state=0, seed=0)
        exact = same.observe()
        np.testing.assert_array_equal(same.state().simulation, state.simulation)
        for field in ("mesh_vert", "mesh_face", "mesh_facenormal", "mesh_facetexcoord", "mesh_facenum"):
            np.testing.assert_array_equal(getattr(environment._model, field), getattr(same._model, field))
    assert {"robot0_link1_vis", "mount0_pedestal"} <= set(names)  # whose triangles are reduced
    for camera in CAMERAS:
        difference = np.abs(fast.images[camera].astype(int) - exact.images[camera])
        assert difference.mean() < 4
        assert 0 < (difference.max(axis=-1) > 8).mean() < 0.15


def test_leaving_out_what_is_not_in_sight_changes_no_pixel(environment: LiberoEnvironment) -> None:
    environment.reset(initial_state=6, seed=1)
    groups = environment._model.geom_group.copy()
    for action in random_actions(3, 4):
        for _ in range(4):
            environment.step(action)
        drawn, everything = environment.observe(), {}
        scene = environment._scene
        assert scene is not None
        for camera in CAMERAS:
            scene.render(camera)
            culled = scene._scene.ngeom
            scene._culls = False
            everything[camera] = scene.render(camera)
            scene._culls = True
            assert culled < scene._scene.ngeom
            np.testing.assert_array_equal(drawn.images[camera], everything[camera])
    np.testing.assert_array_equal(environment._model.geom_group, groups)


def test_an_episode_is_a_function_of_its_seed(environment: LiberoEnvironment) -> None:
    def episode(seed: int, start: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        environment.reset(initial_state=start, seed=seed)
        for action in random_actions(0, 5):
            environment.step(action)
        state, observation = environment.state(), environment.observe()
        return state.simulation, state.fixtures, observation.images["agentview"]

    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    for start in (None, 3):
        first, other, again = episode(1, start), episode(2, start), episode(1, start)
        for one, same in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, same)
        assert np.abs(first[1] - other[1]).max() > 1e-4  # the fixtures stand elsewhere
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(("suite", "index"), [("libero_goal", 2), ("libero_object", 1)])
def test_fresh_layouts_equal_those_of_a_hard_reset(suite: str, index: int, primitive: AssetSet) -> None:
    task = find_task(suite, index)
    reference = libero_environment(task, primitive, initialization_noise="default")
    benchmark = initial_states(task)
    with LiberoEnvironment(task, assets=primitive, image_size=16) as environment:
        for seed in range(2):
            environment.reset(seed=seed)
            with quiet():
                reference.env.object_property_initializers.clear()  # LIBERO adds them again at every hard reset
                reference.seed(seed)
                reference.reset()
            np.testing.assert_array_equal(environment.start.simulation, reference.get_sim_state())
            assert np.abs(benchmark - environment.start.simulation).max(axis=1).min() > 1e-3
            assert not environment.success()
    reference.close()


def test_replay_from_the_stored_start(environment: LiberoEnvironment) -> None:
    actions = random_actions(1, 12)
    environment.reset(seed=9)
    start = environment.start
    for action in actions:
        environment.step(action)
    end = environment.state()
    environment.reset(initial_state=0, seed=3)
    environment.reset(initial_state=EnvironmentState(start.simulation.copy(), start.fixtures.copy()), seed=77)
    for action in actions:
        environment.step(action)
    np.testing.assert_array_equal(environment.state().simulation, end.simulation)
    np.testing.assert_array_equal(environment.state().fixtures, end.fixtures)


def test_observation(environment: LiberoEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.reset(initial_state=0, seed=0)
    observation = environment.observe()
    assert set(observation.images) == set(CAMERAS)
    for picture in observation.images.values():
        assert picture.shape == (96, 96, 3)
        assert picture.dtype == np.uint8
        assert picture.flags["C_CONTIGUOUS"]
        assert picture.std() > 10
    # Upright: the robot stands at the upper edge, the empty table is below it.
    picture = observation.images["agentview"].astype(float)
    assert picture[:30, 38:58].std() > 2 * picture[-15:, 38:58].std()
    assert observation.state.shape == (8,)
    assert observation.state.dtype == np.float32
    np.testing.assert_array_equal(environment.proprioception(), observation.state)

    calls: list[str] = []
    assert environment._scene is not None
    monkeypatch.setattr(environment._scene, "render", calls.append)
    environment.reset(initial_state=1, seed=0)
    environment.step(np.zeros(7))
    assert calls == []  # nobody looked


def test_opening_and_closing_the_gripper(environment: LiberoEnvironment) -> None:
    environment.reset(initial_state=0, seed=0)
    for _ in range(10):
        environment.step([0, 0, 0, 0, 0, 0, 1])
    closed = environment.proprioception()[6]
    for _ in range(10):
        environment.step([0, 0, 0, 0, 0, 0, -1])
    assert closed < 0.01
    assert environment.proprioception()[6] > 0.035


def test_bad_input(environment: LiberoEnvironment, primitive: AssetSet, tmp_path: Path) -> None:
    task = find_task("libero_goal", 7)
    environment.reset(initial_state=0, seed=0)
    for action in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="seven finite numbers"):
            environment.step(action)
    with pytest.raises(IndexError, match="start states 0 to 49, not 50"):
        environment.reset(initial_state=50, seed=0)
    with pytest.raises(ValueError, match="has states of shape"):
        environment.reset(initial_state=np.zeros(10), seed=0)
    with pytest.raises(ValueError, match="renderer must be one of"):
        LiberoEnvironment(task, assets=primitive, renderer="slow")
    with pytest.raises(ValueError, match=r"unknown cameras \['wrist'\]"):
        LiberoEnvironment(task, assets=primitive, cameras=["wrist"])
    with LiberoEnvironment(task, assets=primitive) as fresh, pytest.raises(RuntimeError, match="call reset"):
        fresh.step(np.zeros(7))
    broken = shutil.copytree(primitive.path, tmp_path / "assets")
    for file in broken.rglob("*stove*.xml"):
        file.unlink()
    with pytest.raises(RuntimeError, match="cannot build libero_goal/turn_on_the_stove with the primitive assets"):
        LiberoEnvironment(task, assets=AssetSet("primitive", broken))
