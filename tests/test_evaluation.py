"""Rollouts with a pool of fake environments, videos, and (marked) the real simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infovla_peft.data.normalisation import Normaliser
from infovla_peft.evaluation import TaskResult, episode_seed, evaluate, executed_steps, policy_actions
from infovla_peft.inference import Policy
from infovla_peft.models.openvla import build_tiny_openvla
from infovla_peft.simulation import Observation, Task
from infovla_peft.simulation.workers import Episode, EpisodeResult
from infovla_peft.video import write_video

TASKS = [
    Task("libero_goal", index, name, name.replace("_", " "), Path(f"{name}.bddl"))
    for index, name in [(7, "turn_on_the_stove"), (8, "put_the_bowl_on_the_plate")]
]


def observation(seed: int) -> Observation:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Observation({"agentview": image}, random.normal(size=8).astype(np.float32))


class FakePool:
    """Every second episode succeeds; each asks the policy once."""

    def __init__(self) -> None:
        self.episodes: list[Episode] = []
        self.options: list[dict[str, Any]] = []

    def run(self, episodes: Sequence[Episode], act: Any, **options: Any) -> list[EpisodeResult]:
        self.episodes += episodes
        self.options.append(options)
        chunks = act([observation(0) for _ in episodes], [episode.task for episode in episodes])
        assert len(chunks) == len(episodes)
        frames = [np.full((31, 33, 3), shade, dtype=np.uint8) for shade in (0, 80, 160)]
        return [
            EpisodeResult(episode, number % 2 == 0, 10 + number, frames if episode.record_video else None)
            for number, episode in enumerate(episodes)
        ]


@pytest.fixture(scope="module")
def policy() -> Policy:
    low, high = [-1.0] * 7, [0.5] * 7
    statistics = {
        "libero_goal": {
            "action": {"q01": low, "q99": high, "mask": [True] * 6 + [False]},
            "proprio": {"q01": [-2.0] * 8, "q99": [2.0] * 8},
        }
    }
    model, processor = build_tiny_openvla(
        instructions=[task.instruction for task in TASKS],
        image_size=24,
        vision_width=16,
        vision_depth=2,
        hidden_size=16,
        layers=1,
        heads=2,
        chunk=4,
        norm_stats=statistics,
    )
    return Policy(model, processor, Normaliser(statistics, "libero_goal"))


def test_a_policy_gives_a_chunk_of_unnormalised_actions(policy: Policy) -> None:
    seen = observation(1)
    actions = policy.act(seen.images["agentview"], "Turn on the stove", seen.state)
    assert actions.shape == (4, 7)
    normalised = policy.normaliser.normalise_actions(actions)
    inputs = policy.processor(
        ["In: What action should the robot take to turn on the stove?\nOut:"], [[seen.images["agentview"]]]
    )
    state = torch.from_numpy(policy.normaliser.normalise_proprio(seen.state[None]))
    with torch.no_grad():
        expected = policy.model(**inputs, proprio=state).predicted_actions[0].numpy()
    np.testing.assert_allclose(normalised[:, :6], np.clip(expected[:, :6], -1, 1), atol=1e-5)
    np.testing.assert_allclose(actions[:, 6], expected[:, 6], atol=1e-6)


def test_a_batch_gives_what_single_calls_give(policy: Policy) -> None:
    seen = [observation(seed) for seed in range(3)]
    texts = ["turn on the stove", "put the bowl on the plate", "turn on the stove"]
    batch = policy.act_batch([o.images for o in seen], texts, [o.state for o in seen])
    for row, (one, text) in enumerate(zip(seen, texts, strict=True)):
        np.testing.assert_allclose(batch[row], policy.act(one.images, text, one.state), atol=1e-5)


@pytest.mark.parametrize(
    ("proprio", "given"),
    [
        ([np.zeros(8)], "1 row of 8"),
        ([np.zeros(8)] * 3, "3 rows of 8"),
        ([np.zeros(8), np.zeros(7)], "rows of 7 and 8"),
        (np.zeros(8), r"an array of shape \(8,\)"),
        (["standing", "sitting"], "what is no array of numbers"),
        ([[0.0, [0.0]], [0.0, 0.0]], "what is no array of numbers"),
    ],
)
def test_a_batch_says_how_many_states_it_needs(policy: Policy, proprio: Any, given: str) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=rf"axis-angle, fingers\), here 2 rows of 8 numbers; got {given}$"):
        policy.act_batch([image, image], ["turn on the stove"] * 2, proprio)


def test_a_policy_of_one_task_needs_no_instruction(policy: Policy) -> None:
    seen = observation(2)
    with pytest.raises(ValueError, match="say which"):
        policy.act(seen.images, proprio=seen.state)
    single = Policy(policy.model, policy.processor, policy.normaliser, instruction="turn on the stove")
    np.testing.assert_array_equal(
        single.act(seen.images, proprio=seen.state), policy.act(seen.images, "turn on the stove", seen.state)
    )


@pytest.mark.parametrize(
    ("images", "proprio", "message"),
    [
        ({"wrist": np.zeros((8, 8, 3), np.uint8)}, np.zeros(8), "no image of"),
        ([np.zeros((8, 8, 3), np.uint8)] * 2, np.zeros(8), "give 1 images, not 2"),
        (np.zeros((8, 8, 3), np.uint8), None, "needs proprioception of 8 .*here 1 row of 8 numbers; got none"),
        (np.zeros((8, 8, 3), np.uint8), np.zeros(7), "needs proprioception of 8 .*here 1 row of 8 .*; got 1 row of 7"),
        (np.zeros((8, 8, 3), np.uint8), [0.0, np.nan, *[0.0] * 5, np.inf], "2 numbers that are NaN or infinite"),
        (np.zeros((8, 8, 3), np.float32), np.zeros(8), "uint8"),
        (np.zeros((3, 8, 8), np.uint8), np.zeros(8), r"uint8 array .*, got uint8 \(3, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), np.zeros(8), r"uint8 array .*, got uint8 \(8, 8\)"),
        (np.zeros((0, 0, 3), np.uint8), np.zeros(8), r"at least one pixel, got uint8 \(0, 0, 3\)"),
        (torch.zeros(8, 8, 3), np.zeros(8), r"uint8 array .*, got torch\.float32 \(8, 8, 3\)"),
        (Image.new("F", (8, 8), 200), np.zeros(8), "mode 'F' holds no bytes"),
        (Image.new("I;16", (8, 8), 40000), np.zeros(8), "mode 'I;16' holds no bytes"),
        (None, np.zeros(8), r"images of \['agentview'\] must be given in a sequence, .* got None"),
        ({"agentview": None}, np.zeros(8), r"PIL image or a uint8 array .*, got object"),
    ],
)
@pytest.mark.parametrize("crop", [False, True])
def test_unusable_observations_are_explained(
    policy: Policy, images: Any, proprio: Any, message: str, crop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "crop", crop)
    with pytest.raises(ValueError, match=message):
        policy.act(images, "turn on the stove", proprio)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("", "must be a text that says what to do, got ''"),
        ("  \n", "must be a text that says what to do"),
        (["turn on the stove"], r"must be one text, got \['turn on the stove'\]; act_batch takes several"),
    ],
)
def test_an_instruction_says_what_to_do(policy: Policy, instruction: Any, message: str) -> None:
    seen = observation(1)
    with pytest.raises(ValueError, match=message):
        policy.act(seen.images, instruction, seen.state)
    with pytest.raises(ValueError, match=message):
        Policy(policy.model, policy.processor, policy.normaliser, instruction="turn on the stove").act(
            seen.images, instruction, seen.state
        )


def test_a_batch_has_one_entry_per_observation(policy: Policy) -> None:
    seen = observation(1)
    images, states = [seen.images] * 2, [seen.state] * 2
    for wrong, message in (
        ((images, "ab", states), "instructions must be given in a sequence, one each, got 'ab'"),
        ((images, ["turn on the stove", " "], states), "must be a text that says what to do, got ' '"),
        ((images, ["turn on the stove", 7], states), "must be a text that says what to do, got 7"),
        ((None, ["turn on the stove"], states), "images must be given in a sequence, one each, got None"),
        ((seen.images, ["turn on the stove"], states), "images must be given in a sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            policy.act_batch(*wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("crop", [False, True])
def test_a_pil_image_and_a_tensor_are_images(policy: Policy, crop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "crop", crop)
    seen = observation(3)
    (camera,) = policy.cameras
    pixels = seen.images[camera]
    picture = Image.fromarray(pixels)
    expected = policy.act(pixels, "turn on the stove", seen.state)
    tensor = torch.from_numpy(pixels)
    for images in (picture, [picture], {camera: picture}, picture.convert("RGBA"), tensor, [tensor], tensor[None]):
        np.testing.assert_array_equal(policy.act(images, "turn on the stove", seen.state), expected)


def test_results_come_task_by_task_from_the_first_benchmark_states(policy: Policy) -> None:
    pool = FakePool()
    results = evaluate(policy, TASKS, pool, episodes=3, open_loop_steps=4)  # type: ignore[arg-type]
    first = next(results)
    assert (first.task, first.successes, first.steps) == ("turn_on_the_stove", [True, False, True], [10, 11, 12])
    assert len(pool.episodes) == 3  # the second task has not begun
    second = next(results)
    assert second.rate == pytest.approx(2 / 3)
    assert [episode.initial_state_index for episode in pool.episodes] == [0, 1, 2] * 2
    assert len({episode.seed for episode in pool.episodes}) == 6
    assert TaskResult.from_dict(second.to_dict()) == second


def test_choices_can_be_made_on_other_states_than_are_reported(policy: Policy) -> None:
    pool = FakePool()
    list(evaluate(policy, TASKS[:1], pool, episodes=3, first_state=40))  # type: ignore[arg-type]
    assert [episode.initial_state_index for episode in pool.episodes] == [40, 41, 42]
    with pytest.raises(ValueError, match="got 11 from state 40 on"):
        list(evaluate(policy, TASKS, pool, episodes=11, first_state=40))  # type: ignore[arg-type]


def test_episode_seeds_depend_on_nothing_else() -> None:
    assert episode_seed(0, 7, 3) == episode_seed(0, 7, 3)
    assert episode_seed(0, 7, 3) != episode_seed(1, 7, 3)


@pytest.mark.parametrize("episodes", [0, 51])
def test_only_fifty_states_exist(policy: Policy, episodes: int) -> None:
    with pytest.raises(ValueError, match="1 to 50"):
        list(evaluate(policy, TASKS, FakePool(), episodes=episodes))  # type: ignore[arg-type]


def test_the_gripper_is_turned_into_liberos_convention() -> None:
    model_side = np.array([[[0.1] * 6 + [1.0], [0.1] * 6 + [0.0]]])
    stub = SimpleNamespace(
        act_batch=lambda *_: model_side, normaliser=Normaliser({"x": {"action": {"q01": [0], "q99": [1]}}})
    )
    (chunk,) = policy_actions(stub)([observation(0)], [TASKS[0]])  # type: ignore[arg-type]
    assert chunk[:, 6].tolist() == [-1.0, 1.0]


def test_videos_show_failures_first(policy: Policy, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    (result,) = evaluate(
        policy,
        TASKS[:1],
        FakePool(),
        episodes=4,
        videos=3,
        video_folder=tmp_path,  # type: ignore[arg-type]
    )
    assert result.videos == [
        "turn_on_the_stove_01_failure.mp4",
        "turn_on_the_stove_03_failure.mp4",
        "turn_on_the_stove_00_success.mp4",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(result.videos)
    with av.open(str(tmp_path / result.videos[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 5.0  # its chunks have 4 actions, not 8
    assert [frame.shape for frame in frames] == [(30, 32, 3)] * 3  # even sides
    assert [abs(float(frame.mean()) - shade) < 4 for frame, shade in zip(frames, (0, 80, 160), strict=True)] == [
        True
    ] * 3


def test_no_more_is_executed_than_is_predicted(policy: Policy) -> None:
    pool = FakePool()
    for steps in (2, 4, 8):
        list(evaluate(policy, TASKS[:1], pool, episodes=1, open_loop_steps=steps))  # type: ignore[arg-type]
    assert [options["open_loop_steps"] for options in pool.options] == [2, 4, 4]
    assert [executed_steps(policy, steps) for steps in (2, 8)] == [2, 4]


def test_what_writing_videos_needs_is_checked_before_the_first_rollout(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infovla_peft.video.video_available", lambda: False)
    for videos, error, message in ((1, ImportError, r"needs PyAV: .*--videos 0"), (-1, ValueError, "at least 0")):
        pool = FakePool()
        with pytest.raises(error, match=message):
            list(evaluate(policy, TASKS, pool, videos=videos, video_folder=tmp_path))  # type: ignore[arg-type]
        assert not pool.episodes
    list(evaluate(policy, TASKS[:1], FakePool(), episodes=1, video_folder=tmp_path))  # type: ignore[arg-type]


def test_a_video_needs_frames_of_one_shape(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="one shape"):
        write_video(tmp_path / "a.mp4", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)])
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", [])
    assert not list(tmp_path.iterdir())


def test_seed_cap_and_steps_are_those_that_were_asked_for(policy: Policy) -> None:
    pool = FakePool()
    list(evaluate(policy, TASKS[:1], pool, episodes=2, seed=5, open_loop_steps=3, max_steps=77))  # type: ignore[arg-type]
    assert [episode.seed for episode in pool.episodes] == [episode_seed(5, TASKS[0].index, state) for state in (0, 1)]
    assert pool.options == [{"open_loop_steps": 3, "max_steps": 77, "progress": True}]


def test_the_policy_is_told_the_instruction_and_the_state() -> None:
    heard: list[tuple[Any, ...]] = []

    def act_batch(*arguments: Any) -> Any:
        heard.append(arguments)
        return np.zeros((2, 4, 7))

    stub = SimpleNamespace(act_batch=act_batch, normaliser=Normaliser({"x": {"action": {"q01": [0], "q99": [1]}}}))
    seen = [observation(0), observation(1)]
    policy_actions(stub)(seen, TASKS)  # type: ignore[arg-type]
    ((images, instructions, states),) = heard
    assert instructions == [task.instruction for task in TASKS]
    assert all(given is each.images for given, each in zip(images, seen, strict=True))
    assert all(given is each.state for given, each in zip(states, seen, strict=True))


def test_images_by_name_are_taken_in_the_order_of_the_training() -> None:
    stub: Any = SimpleNamespace(cameras=("agentview", "robot0_eye_in_hand"))
    agent, wrist = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
    row = Policy._in_order(stub, {"robot0_eye_in_hand": wrist, "agentview": agent})
    assert row[0] is agent
    assert row[1] is wrist
