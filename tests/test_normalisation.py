"""Frozen normalisation: conventions, percentiles, round trips, NumPy and tensors alike."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infovla_peft.data.chunks import ChunkDataset
from infovla_peft.data.normalisation import Normaliser, compute_statistics, to_env_action, to_model_action
from infovla_peft.data.rows import DemonstrationError
from infovla_peft.data.statistics import statistics_of


@pytest.fixture(scope="module")
def statistics() -> dict[str, object]:
    random = np.random.default_rng(0)
    actions = random.uniform(-0.8, 0.6, (500, 7)).astype(np.float32)
    actions[:, 3] = 0.25  # a dimension that never varies
    actions[:, 6] = random.choice([-1.0, 1.0], 500)
    return compute_statistics(actions, random.normal(1.0, 2.0, (500, 8)), trajectories=5)


def test_statistics_have_the_format_of_openvla(statistics: dict[str, object]) -> None:
    assert json.loads(json.dumps(statistics, allow_nan=False)) == statistics
    assert set(statistics) == {"action", "proprio", "num_transitions", "num_trajectories"}
    action = statistics["action"]
    assert isinstance(action, dict)
    assert set(action) == {"mean", "std", "min", "max", "q01", "q99", "mask"}
    assert action["mask"] == [True] * 6 + [False]
    assert (action["min"][6], action["max"][6]) == (0.0, 1.0)  # the model's convention
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (500, 5)


@pytest.mark.parametrize(
    ("actions", "states", "message"),
    [
        (np.zeros((0, 7)), np.zeros((0, 8)), "N ≥ 1"),
        (np.zeros((2, 7)), np.zeros((3, 8)), "expected actions"),
        (np.full((2, 7), np.nan), np.zeros((2, 8)), "NaN or infinite"),
    ],
)
def test_unusable_demonstrations(actions: np.ndarray, states: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute_statistics(actions, states, 1)


def test_gripper_conventions() -> None:
    actions = np.array([[0.5, -1.0], [0.5, 1.0], [0.5, -3.0]], dtype=np.float32)
    model = to_model_action(actions)
    assert model.dtype == np.float32
    assert model[:, 1].tolist() == [1.0, 0.0, 1.0]
    assert to_env_action(model)[:, 1].tolist() == [-1.0, 1.0, -1.0]
    assert to_env_action(torch.tensor([[0.5, 0.51]])).tolist() == [[0.5, -1.0]]
    assert to_env_action(torch.tensor([[0.5, 0.49]])).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize(
    ("gripper", "fits"),
    [
        ([-1, 1, 1], True), ([-1.02, 0.3, 1.001], True), ([-1, -1, -1], True), ([1, 1, 1], True), ([0, 0, 0], True),
        ([0.97, 1, 0.99], True),
        ([1, 0, 1], False), ([0, 0.5, 0.9], False), ([0, 0.04, 0.08], False), ([0, 100, 30], False),
        ([-2, 1, 1], False),
    ],
)  # fmt: skip
def test_a_gripper_in_another_convention_is_refused(gripper: list[float], fits: bool) -> None:
    actions = np.c_[np.random.default_rng(0).uniform(-1, 1, (3, 6)), gripper]
    rows = {"action": actions.tolist(), "state": np.ones((3, 8)).tolist(), "task": ["a"] * 3, "instruction": ["a"] * 3}
    frames = datasets.Dataset.from_dict(
        {**rows, "episode_index": [0] * 3, "frame_index": [0, 1, 2], "image": ["x"] * 3}
    )
    pipeline: Any = SimpleNamespace(side=1)
    if fits:
        assert statistics_of(frames)["num_transitions"] == 3
        assert len(ChunkDataset(frames, pipeline, cache_images=False)) == 3
        return
    low, high = (f"{number:g}" for number in (min(gripper), max(gripper)))
    message = rf"gripper, .* goes from {low} to {high} as .*_demonstrations\(\.\.\., gripper=\({high}, {low}\)"
    for make in (statistics_of, lambda frames: ChunkDataset(frames, pipeline, cache_images=False)):
        with pytest.raises(DemonstrationError, match=message):
            make(frames)


def test_percentiles_become_the_unit_interval(statistics: dict[str, object]) -> None:
    normaliser = Normaliser({"libero_goal": statistics})
    action = statistics["action"]
    assert isinstance(action, dict)
    low, high = np.array(action["q01"]), np.array(action["q99"])
    np.testing.assert_allclose(normaliser.normalise_actions(low)[[0, 1, 2, 4, 5]], -1.0, atol=1e-9)
    np.testing.assert_allclose(normaliser.normalise_actions(high)[[0, 1, 2, 4, 5]], 1.0, atol=1e-9)
    assert normaliser.normalise_actions(low)[3] == 0.0  # never varied
    assert normaliser.unnormalise_actions(np.zeros(7))[3] == pytest.approx(0.25)
    assert normaliser.normalise_actions(np.full(7, 0.7))[6] == 0.7  # the gripper passes
    assert np.abs(normaliser.normalise_actions(np.full((2, 3, 7), 9.0))[..., :6]).max() == 1.0  # clipped
    assert (normaliser.action_dim, normaliser.proprio_dim) == (7, 8)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda found: found["action"].pop("q01"), r"q01 and q99 of shapes \(0,\) and \(7,\)"),
        (lambda found: found["proprio"].pop("q99"), r"q01 and q99 of shapes \(8,\) and \(0,\)"),
        (lambda found: found.pop("action"), "q01 and q99 of shapes"),
        (lambda found: found["action"]["q01"].pop(), "q01 and q99 of shapes"),
        (lambda found: found["action"]["mask"].pop(), "a mask of another length"),
    ],
)
def test_statistics_that_lack_something(statistics: dict[str, object], edit: Any, message: str) -> None:
    found = copy.deepcopy(statistics)
    edit(found)
    with pytest.raises(ValueError, match=rf"{message}.*copy dataset_statistics\.json"):
        Normaliser({"libero_goal": found})


@given(st.lists(st.floats(-0.7, 0.5), min_size=7, max_size=7))
def test_actions_come_back(values: list[float]) -> None:
    random = np.random.default_rng(1)
    wide = compute_statistics(random.uniform(-1, 1, (200, 7)), random.uniform(-1, 1, (200, 8)), 1)
    normaliser, action = Normaliser({"x": wide}), np.array(values)
    np.testing.assert_allclose(normaliser.unnormalise_actions(normaliser.normalise_actions(action)), action, atol=1e-9)


def test_numpy_and_tensors_agree(statistics: dict[str, object]) -> None:
    normaliser = Normaliser({"libero_goal": statistics})
    action = np.random.default_rng(2).uniform(-1, 1, (4, 8, 7)).astype(np.float32)
    state = np.random.default_rng(3).uniform(-1, 1, (4, 8)).astype(np.float32)
    for method, array in (
        (normaliser.normalise_actions, action),
        (normaliser.unnormalise_actions, action),
        (normaliser.normalise_proprio, state),
        (normaliser.unnormalise_proprio, state),
        (to_model_action, action),
        (to_env_action, action),
    ):
        expected, actual = method(array), method(torch.from_numpy(array))
        assert expected.dtype == np.float32
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-7)


def test_keys(statistics: dict[str, object]) -> None:
    assert Normaliser({"libero_goal_no_noops": statistics, "other": statistics}, "libero_goal").key == (
        "libero_goal_no_noops"
    )
    assert Normaliser({"libero_goal": statistics}).as_statistics() == {"libero_goal": statistics}
    with pytest.raises(KeyError, match=r"no statistics for 'libero_gaol'.*libero_goal"):
        Normaliser({"libero_goal": statistics, "libero_10": statistics}, "libero_gaol")
    with pytest.raises(KeyError, match="several data sets"):
        Normaliser({"libero_goal": statistics, "libero_10": statistics})
    with pytest.raises(KeyError, match="no action statistics"):
        Normaliser({})


def test_minimum_and_maximum_as_bounds(statistics: dict[str, object]) -> None:
    normaliser = Normaliser({"aloha": statistics}, bounds="bounds")
    action = statistics["action"]
    assert isinstance(action, dict)
    np.testing.assert_allclose(normaliser.unnormalise_actions(np.ones(7))[:3], action["max"][:3])


def test_a_base_without_proprioception_says_so(statistics: dict[str, object]) -> None:
    normaliser = Normaliser({"bridge": {"action": statistics["action"]}})
    assert normaliser.proprio_dim == 0
    with pytest.raises(ValueError, match="no proprioception"):
        normaliser.normalise_proprio(np.zeros(8))


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (0.3, True), (0.02, False), (40.0, False)])
def test_actions_of_another_controller_have_bounds_of_their_own(scale: float, fits: bool) -> None:
    random = np.random.default_rng(0)
    actions = np.concatenate([random.uniform(-scale, scale, (200, 6)), np.sign(random.normal(size=(200, 1)))], axis=1)
    rows = {"action": actions.tolist(), "state": random.normal(size=(200, 8)).tolist()}
    frames = datasets.Dataset.from_dict({**rows, "task": ["a"] * 200, "episode_index": [0] * 200})
    found = statistics_of(frames)["action"]
    if fits:  # LIBERO's controller
        assert (found["q01"][:6], found["q99"][:6]) == ([-1.0] * 6, [1.0] * 6)
    else:
        normaliser = Normaliser({"a": {"action": found}})
        moved = to_model_action(actions)
        np.testing.assert_allclose(normaliser.unnormalise_actions(normaliser.normalise_actions(moved)), moved)
        assert (np.array(found["q99"][:6]) < 2.1 * scale).all()  # and the range is used
    assert found["q01"][6] == 0.0
    assert found["q99"][6] == 1.0


def test_the_percentiles_are_the_first_and_the_ninety_ninth() -> None:
    ramp = np.linspace(0, 1, 101)[:, None]
    found = compute_statistics(np.repeat(ramp, 7, 1), np.repeat(ramp, 8, 1), 1)["proprio"]
    np.testing.assert_allclose(found["q01"] + found["q99"], [0.01] * 8 + [0.99] * 8)
