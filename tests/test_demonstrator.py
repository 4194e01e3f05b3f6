"""The scripted demonstrator: geometry and grasps on made-up shapes, whole episodes in the simulator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from infovla_peft.data.demonstrations import DemonstrationManifest, load_demonstrations
from infovla_peft.data.recording import RecordingSettings, record_demonstrations, record_episode, replay
from infovla_peft.simulation import AssetSet, LiberoEnvironment, find_assets, find_task
from infovla_peft.simulation.demonstrator import STEPS_AFTER_SUCCESS, Demonstration, Demonstrator
from infovla_peft.simulation.geometry import (
    Array,
    Reach,
    Scene,
    Surface,
    half_turn,
    rotation_about,
    rotation_vector,
    sample_surface,
)
from infovla_peft.simulation.grasping import closing_axis, hand_rotation, plan_grasps

FLOOR = 0.0


# --- geometry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, 2.0, np.pi - 1e-7, np.pi])
def test_rotation_vector_inverts_rotation_about(angle: float) -> None:
    for axis in np.random.default_rng(0).normal(size=(20, 3)):
        rotation = rotation_about(axis, angle)
        vector = rotation_vector(rotation)
        assert np.linalg.norm(vector) == pytest.approx(angle, abs=1e-6)
        np.testing.assert_allclose(rotation @ axis, axis, atol=1e-12)
        if angle > 0:
            np.testing.assert_allclose(rotation_about(vector, float(np.linalg.norm(vector))), rotation, atol=1e-6)


def test_half_turn_is_the_same_gripper() -> None:
    for angle in np.linspace(-7, 7, 41):
        turned = half_turn(angle)
        assert -np.pi / 2 <= turned < np.pi / 2
        assert abs(closing_axis(turned) @ closing_axis(angle)) == pytest.approx(1)


def test_hand_rotation_points_down_and_leans_about_its_closing_axis() -> None:
    for yaw in (0.0, 0.7, -1.2):
        np.testing.assert_allclose(hand_rotation(yaw)[:, 2], [0, 0, -1], atol=1e-12)
        leaned = hand_rotation(yaw, 0.5)[:, 2]
        assert leaned @ closing_axis(yaw) == pytest.approx(0, abs=1e-12)
        assert leaned[2] == pytest.approx(-np.cos(0.5))


SHAPES = """
<mujoco>
  <asset><mesh name="m" vertex="0 0 0  .1 0 0  0 .1 0  0 0 .1"/></asset>
  <worldbody>
    <geom type="box" size=".03 .02 .01"/>
    <geom type="cylinder" size=".03 .05"/>
    <geom type="capsule" size=".02 .04"/>
    <geom type="sphere" size=".04"/>
    <geom type="ellipsoid" size=".05 .03 .02"/>
    <geom type="mesh" mesh="m"/>
    <geom type="plane" size="1 1 1"/>
  </worldbody>
</mujoco>
"""


@pytest.mark.libero
def test_sampled_points_lie_on_the_surface_with_outward_normals() -> None:
    import mujoco

    model = mujoco.MjModel.from_xml_string(SHAPES)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    for geom in range(model.ngeom - 1):
        surface = sample_surface(model, geom, 0.004)
        placed = surface.moved(data.geom_xpos[geom], data.geom_xmat[geom].reshape(3, 3))
        assert len(placed.points) > 10
        np.testing.assert_allclose(np.linalg.norm(placed.normals, axis=1), 1, atol=1e-9)
        outside = placed.points + 0.003 * placed.normals
        hits = [  # a ray from just outside, against the normal, meets the geom after that distance
            mujoco.mj_rayMesh(model, data, geom, start, -normal)
            if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH
            else mujoco.mju_rayGeom(
                data.geom_xpos[geom],
                data.geom_xmat[geom],
                model.geom_size[geom],
                start,
                -normal,
                model.geom_type[geom],
            )
            for start, normal in zip(outside, placed.normals, strict=True)
        ]
        met = np.array(hits)[np.array(hits) >= 0]  # rays along an edge may miss
        assert len(met) > 0.8 * len(hits)
        np.testing.assert_allclose(met, 0.003, atol=1e-6)
    assert len(sample_surface(model, model.ngeom - 1, 0.004).points) == 0  # a plane


# --- grasps --------------------------------------------------------------------------------------------------------


def box(half: tuple[float, float, float], center: tuple[float, float, float], yaw: float = 0.0) -> Surface:
    """Points on a box."""
    ticks = [np.linspace(-size, size, 25) for size in half]
    points, normals = [], []
    for axis in range(3):
        for sign in (-1, 1):
            grid = np.stack(np.meshgrid(*(ticks[a] if a != axis else [sign * half[a]] for a in range(3))), -1)
            points.append(grid.reshape(-1, 3))
            normals.append(np.tile(np.eye(3)[axis] * sign, (len(points[-1]), 1)))
    surface = Surface(np.concatenate(points), np.concatenate(normals))
    return surface.moved(np.array(center), rotation_about((0, 0, 1), yaw))


NOTHING: Array = np.zeros((0, 3))


@pytest.mark.parametrize("yaw", np.deg2rad([0, 30, -45, 90]))
def test_the_best_grasp_closes_across_the_narrow_side(yaw: float) -> None:
    brick = box((0.06, 0.02, 0.03), (0.1, -0.2, 0.03), yaw)
    best, *others = plan_grasps(brick, NOTHING, FLOOR)
    assert best.width == pytest.approx(0.04, abs=1e-3)
    np.testing.assert_allclose(best.position[:2], [0.1, -0.2], atol=0.01)
    assert abs(closing_axis(best.yaw) @ closing_axis(yaw)) == pytest.approx(1, abs=1e-6)
    assert best.position[2] > FLOOR
    assert all(grasp.score <= best.score for grasp in others)
    assert all(
        np.linalg.norm(a.position - b.position) > 0.012 or abs(a.yaw - b.yaw) > 0.3
        for a in (best, *others)
        for b in (best, *others)
        if a is not b
    )


def test_what_does_not_fit_has_no_grasp() -> None:
    assert plan_grasps(box((0.05, 0.05, 0.03), (0, 0, 0.03)), NOTHING, FLOOR, yaws=(0.0, np.pi / 2)) == []


def test_obstacles_move_the_grasp() -> None:
    brick = box((0.06, 0.02, 0.03), (0, 0, 0.03))
    wall = box((0.03, 0.005, 0.08), (0.0, 0.05, 0.08)).points  # where a finger would go, in the middle
    best = plan_grasps(brick, wall, FLOOR)[0]
    assert abs(best.position[0]) > 0.03
    walls = np.concatenate([box((0.12, 0.005, 0.08), (0.0, side, 0.08)).points for side in (0.05, -0.05)])
    assert all(grasp.score < best.score - 0.05 for grasp in plan_grasps(brick, walls, FLOOR, yaws=(0.0,)))


def test_of_equal_grasps_it_is_always_the_one_on_the_same_side() -> None:
    """A ring is grasped at its rim; which side is nearly as good as which shall not hang on the last digit."""
    random = np.random.default_rng(0)
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    outward = np.stack((np.cos(angle), np.sin(angle), np.zeros_like(angle)), 1)
    rim = [(radius, sign) for radius, sign in ((0.048, -1.0), (0.054, 1.0))]
    for _ in range(8):
        center = np.append(random.uniform(-0.1, 0.1, 2), 0.03)
        points = np.concatenate([r * outward + [0, 0, z] for r, _ in rim for z in np.linspace(-0.03, 0.03, 13)])
        normals = np.concatenate([sign * outward for _, sign in rim for _ in range(13)])
        noise = random.normal(0, 2e-4, points.shape)
        ring = Surface(points + noise + center, normals)
        best = plan_grasps(ring, NOTHING, FLOOR, center=center, yaws=(0.0, np.pi / 2))[0]
        assert best.position[1] - center[1] > 0.03


def test_a_leaning_hand_is_the_same_search_in_a_turned_scene() -> None:
    brick = box((0.06, 0.02, 0.06), (0, 0, 0.06))
    leaning = plan_grasps(brick, NOTHING, FLOOR, leans=(0.5,), yaws=(0.0,))[0]
    assert leaning.lean == 0.5
    assert leaning.approach[2] == pytest.approx(-np.cos(0.5))
    upright = plan_grasps(brick, NOTHING, FLOOR, yaws=(0.0,))[0]
    assert leaning.score < upright.score


# --- episodes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def primitive() -> AssetSet:
    return find_assets("primitive")


@pytest.fixture(scope="module")
def stove(primitive: AssetSet) -> Iterator[LiberoEnvironment]:
    with LiberoEnvironment(find_task("libero_goal", "turn_on_the_stove"), assets=primitive, image_size=32) as made:
        yield made


def run(environment: LiberoEnvironment, seed: int, *, render: bool = False) -> Demonstration:
    environment.reset(seed=seed)
    return Demonstrator(environment).run(np.random.default_rng(seed), render=render)


@pytest.mark.libero
def test_an_episode_is_what_a_person_would_have_recorded(stove: LiberoEnvironment) -> None:
    episode = run(stove, 1, render=True)
    assert episode.success, episode.failure
    frames = len(episode)
    assert episode.states.shape == (frames, 8)
    assert episode.actions.shape == episode.executed_actions.shape == (frames, 7)
    assert [picture.shape for picture in episode.images["agentview"]] == [(32, 32, 3)] * frames
    assert all(values.dtype == np.float32 for values in (episode.states, episode.actions, episode.executed_actions))
    assert np.abs(episode.actions).max() <= 1
    assert np.abs(episode.executed_actions).max() <= 1
    assert set(np.unique(episode.actions[:, 6])) == {-1.0, 1.0}
    np.testing.assert_array_equal(episode.actions[:, 6], episode.executed_actions[:, 6])
    noise = (episode.executed_actions - episode.actions)[:, :6]
    free = np.abs(episode.executed_actions[:, :6]) < 1  # elsewhere it was clipped
    assert 0.08 < noise[free].std() < 0.12
    assert episode.succeeded.sum() == STEPS_AFTER_SUCCESS + 1
    assert episode.succeeded[-STEPS_AFTER_SUCCESS - 1 :].all()


@pytest.mark.libero
def test_the_same_seed_gives_the_same_episode_whatever_came_before(
    stove: LiberoEnvironment, primitive: AssetSet
) -> None:
    first = run(stove, 3, render=True)
    run(stove, 4)
    again = run(stove, 3)  # pictures change nothing either
    with LiberoEnvironment(stove.task, assets=primitive, image_size=32) as fresh:
        other = run(fresh, 3)
    for name in ("states", "actions", "executed_actions", "succeeded"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
        np.testing.assert_array_equal(getattr(other, name), getattr(first, name))
    assert len(run(stove, 5)) != 0


@pytest.mark.libero
def test_noise_does_not_keep_it_waiting(stove: LiberoEnvironment) -> None:
    closing = []
    for seed in range(6):
        stove.reset(seed=100 + seed)
        episode = Demonstrator(stove, noise=0.1).run(np.random.default_rng(seed), render=False)
        assert episode.success
        closing.append(int(np.argmax(episode.actions[:, 6] > 0)))
    assert max(closing) - min(closing) < 25  # hovering at waypoints took up to 70 steps more


@pytest.mark.libero
def test_a_task_that_is_not_done_in_time_says_so(stove: LiberoEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiberoEnvironment, "max_steps", 10)
    episode = run(stove, 1)
    assert not episode.success
    assert episode.failure == "not done after 10 steps"
    assert len(episode) == 10


@pytest.mark.libero
def test_the_scene_knows_what_libero_knows(stove: LiberoEnvironment) -> None:
    stove.reset(seed=0)
    scene = Scene(stove.env)
    assert scene.position("plate_1")[2] > scene.table_height - 0.01
    assert scene.lowest("akita_black_bowl_1") == pytest.approx(scene.table_height, abs=0.02)
    assert scene.region_owner("wooden_cabinet_1_top_region") == "wooden_cabinet_1"
    drawer = scene.region_joint("wooden_cabinet_1_top_region")
    assert drawer is not None
    assert abs(drawer.value) < 0.01
    assert abs(drawer.axis[2]) < 1e-6
    assert scene.region_joint("flat_stove_1_cook_region") is None
    assert scene.touching("plate_1")
    assert not scene.grasped("plate_1")
    assert not scene.holds(("turnon", "flat_stove_1"))
    hand = stove.proprioception()[:3].astype(float)
    assert Reach(scene).distance(hand) < Reach.TOP
    assert Reach(scene).highest(hand) > hand[2]


GENERIC = [("libero_goal", "put_the_bowl_on_the_plate"), ("libero_goal", "open_the_middle_drawer_of_the_cabinet")]


@pytest.mark.libero
@pytest.mark.parametrize(("suite", "name"), GENERIC)
def test_it_solves_fresh_layouts(suite: str, name: str, primitive: AssetSet) -> None:
    with LiberoEnvironment(find_task(suite, name), assets=primitive) as environment:
        assert sum(run(environment, seed).success for seed in range(3)) >= 2


# --- recordings in the simulator -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(primitive: AssetSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    task = find_task("libero_goal", "turn_on_the_stove")
    record_demonstrations([task], folder, episodes=2, assets=primitive, image_size=32, num_workers=2, progress=False)
    return folder


@pytest.mark.libero
def test_a_recorded_episode_replays_open_loop(recorded: Path, stove: LiberoEnvironment) -> None:
    for episode in DemonstrationManifest.load(recorded).tasks[stove.task.name].episodes.values():
        path = recorded / episode.file
        assert replay(path, stove)
        table = pq.read_table(path)  # and comes to the same states, bit for bit
        np.testing.assert_array_equal(table["state"].to_pylist()[0], _replayed_states(stove, path)[0])
        np.testing.assert_array_equal(table["state"].to_pylist()[-1], _replayed_states(stove, path)[-1])


def _replayed_states(environment: LiberoEnvironment, path: Path) -> Array:
    from infovla_peft.data.demonstrations import read_start

    environment.reset(initial_state=read_start(path), seed=99)
    states = []
    for action in pq.read_table(path)["executed_action"].to_pylist():
        states.append(environment.proprioception())
        environment.step(action)
    return np.array(states)


@pytest.mark.libero
def test_workers_record_what_one_process_records(recorded: Path, stove: LiberoEnvironment) -> None:
    settings = DemonstrationManifest.load(recorded).settings
    assert isinstance(settings, RecordingSettings)
    episode = record_episode(stove, 1, settings)
    stored = pq.read_table(recorded / episode.record.file).to_pydict()
    assert stored == episode.columns


@pytest.mark.libero
def test_recording_goes_on_where_it_stopped(recorded: Path, stove: LiberoEnvironment, primitive: AssetSet) -> None:
    manifest = DemonstrationManifest.load(recorded)
    record = manifest.tasks[stove.task.name]
    kept, lost = (recorded / record.episodes[index].file for index in (0, 1))
    before, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    again = record_demonstrations([stove.task], recorded, episodes=2, assets=primitive, image_size=32, progress=False)
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == stamp
    assert again == manifest
    assert len(load_demonstrations(recorded)) == sum(e.frames for e in record.episodes.values())


@pytest.mark.libero
def test_arguments_are_checked_before_anything_starts(tmp_path: Path, primitive: AssetSet) -> None:
    task = find_task("libero_goal", 7)
    with pytest.raises(ValueError, match="cameras to record"):
        record_demonstrations([task], tmp_path, episodes=1, assets=primitive, cameras=["frontview"])
    with pytest.raises(ValueError, match="at least 1"):
        record_demonstrations([task], tmp_path, episodes=0, assets=primitive)
    with pytest.raises(ValueError, match="same name"):
        record_demonstrations([task, task], tmp_path, episodes=1, assets=primitive)
    assert list(tmp_path.iterdir()) == []
