"""Replay memory: what is kept, how it is stored; stratified batches as a pure function of seed and number."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_policy import tiny_policy
from toy_demonstrations import TASKS, toy_demonstrations

from infovla_peft import rehearsal
from infovla_peft.adapters import add_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.data.chunks import ChunkDataset
from infovla_peft.data.counterfactual import CounterfactualDataset
from infovla_peft.data.images import ImagePipeline
from infovla_peft.data.sampling import Augmentation, Draw, ReplayMixture, StratifiedBatchSampler, Views
from infovla_peft.memory import Anchors, ReplayMemory
from infovla_peft.models.openvla import OpenVLAImageProcessor
from infovla_peft.speed.opening import resident_bytes

DRAWER, STOVE, BOWL = TASKS


def some_anchors(frames: int) -> Anchors:
    return Anchors(
        action=torch.randn(2, frames, 3),
        affinity=torch.randn(2, frames, 4, 5),
        fused=torch.randn(2, frames, 6),
        output=torch.randn(2, frames, 4, 7),
        words=torch.arange(frames) % 5 + 1,
        shifts=torch.zeros(2, frames, 2, dtype=torch.long),
        spec={DRAWER: {"teacher": "base", "rows": str(frames)}},
    )


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_one_trajectory_per_task() -> None:
    memory = ReplayMemory().add(toy_demonstrations([DRAWER, STOVE], episodes=5))
    assert memory.tasks == [DRAWER, STOVE]
    assert len(memory) == 24
    assert memory.frames is not None
    assert memory.frames["frame_index"] == [*range(12), *range(12)]
    later = memory.add(toy_demonstrations([BOWL], episodes=5), trajectories=2)
    assert later.tasks == [DRAWER, STOVE, BOWL]
    assert len(later) == 48
    assert len(memory) == 24


def test_the_choice_depends_on_seed_and_task_alone() -> None:
    def kept(seed: int, tasks: list[str]) -> set[int]:
        memory = ReplayMemory().add(toy_demonstrations(tasks, episodes=8, frames=2), seed=seed)
        assert memory.frames is not None
        return {row["episode_index"] for row in memory.frames if row["task"] == STOVE}

    assert kept(0, [STOVE]) == kept(0, [DRAWER, STOVE])
    assert len({frozenset(kept(seed, [STOVE])) for seed in range(8)}) > 1


def test_nothing_may_be_kept_and_nothing_twice() -> None:
    demonstrations = toy_demonstrations([DRAWER])
    assert len(ReplayMemory().add(demonstrations, trajectories=0)) == 0
    with pytest.raises(ValueError, match="trajectories must be at least 0, got -1"):
        ReplayMemory().add(demonstrations, trajectories=-1)
    others: list[Any] = [[{"task": BOWL}], demonstrations.to_iterable_dataset(), tiny_policy().dataset]
    for other in others:
        with pytest.raises(TypeError, match=r"rows of a datasets.Dataset, .* without streaming=True"):
            ReplayMemory().add(other)
    with pytest.raises(ValueError, match=f"already holds {DRAWER}"):
        ReplayMemory().add(demonstrations).add(demonstrations)


def test_it_reads_back(tmp_path: Path) -> None:
    memory = ReplayMemory().add(toy_demonstrations([DRAWER]))
    memory = memory.with_anchors(some_anchors(12)).save(tmp_path / "memory")
    again = ReplayMemory.load(tmp_path / "memory")
    assert again.tasks == [DRAWER]
    assert memory.frames is not None
    assert again.frames is not None
    assert again.frames[3] == memory.frames[3]
    assert again.anchors is not None
    assert again.anchors.spec == {DRAWER: {"teacher": "base", "rows": "12"}}
    for name, tensor in again.anchors.tensors().items():
        assert torch.equal(tensor, memory.anchors.tensors()[name])  # type: ignore[union-attr]
    assert ReplayMemory().save(tmp_path / "empty").tasks == []


def test_anchors_are_replaced_in_the_folder(tmp_path: Path) -> None:
    memory = ReplayMemory().add(toy_demonstrations([DRAWER])).save(tmp_path)
    assert memory.anchors is None
    anchors = some_anchors(12)
    memory.with_anchors(anchors)
    stored = ReplayMemory.load(tmp_path).anchors
    assert stored is not None
    assert torch.equal(stored.action, anchors.action)
    with pytest.raises(ValueError, match="13 anchors do not belong to 12 frames"):
        memory.with_anchors(some_anchors(13), save=False)


def test_anchors_of_earlier_tasks_stay_when_one_is_added() -> None:
    memory = ReplayMemory().add(toy_demonstrations([DRAWER])).with_anchors(some_anchors(12))
    later = memory.add(toy_demonstrations([STOVE]))
    assert later.anchors is memory.anchors
    assert later.instructions == {DRAWER: TASKS[DRAWER], STOVE: TASKS[STOVE]}


def test_anchors_are_joined_and_taken_apart_by_task() -> None:
    drawer, stove = some_anchors(12), some_anchors(5)
    stove = replace(stove, affinity=stove.affinity[..., :3], spec={STOVE: {"teacher": "one", "rows": "5"}})
    both = Anchors.join([drawer, stove])
    assert len(both) == 17
    assert torch.equal(both.affinity[:, 12:, :, :3], stove.affinity)
    assert not both.affinity[:, 12:, :, 3:].any()
    again = both.of_task(STOVE)
    assert again.spec == stove.spec
    for name in ("action", "fused", "output", "words", "shifts"):
        assert torch.equal(getattr(again, name), getattr(stove, name))
        assert torch.equal(getattr(both.of_task(DRAWER), name), getattr(drawer, name))


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no replay memory"):
        ReplayMemory.load(tmp_path / "none")
    ReplayMemory().add(toy_demonstrations([DRAWER])).with_anchors(some_anchors(12)).save(tmp_path / "m")
    anchors = tmp_path / "m" / "anchors.safetensors"
    anchors.write_bytes(anchors.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"anchors.safetensors is damaged; delete it"):
        ReplayMemory.load(tmp_path / "m")
    anchors.unlink()
    arrow = next((tmp_path / "m" / "frames").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"arrow is damaged; delete .*the run.s own command"):
        ReplayMemory.load(tmp_path / "m")
    (tmp_path / "m" / "memory.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        ReplayMemory.load(tmp_path / "m")


def test_a_summary_is_padded_like_the_batch() -> None:
    anchors = some_anchors(6)
    summary = anchors.summary(torch.tensor([[0, 1], [1, 2]]), longest=3)
    assert torch.equal(summary.affinity[1], anchors.affinity[1, 2, :, :3])
    assert torch.equal(summary.fused[0], anchors.fused[0, 1])
    assert summary.language_mask.tolist() == [[True, True, False], [True, True, True]]
    assert summary.vision_mask.shape == (2, 4)


def test_anchors_on_the_disk_are_the_same_and_leave_no_file(tmp_path: Path) -> None:
    anchors = some_anchors(6)
    mapped = anchors.on_disk(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    for name, tensor in anchors.tensors().items():
        assert torch.equal(getattr(mapped, name), tensor)
    assert mapped.spec == anchors.spec


def test_memory_does_not_grow_with_the_anchors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a stage is prepared, the anchors of one task are in memory, however many there are."""
    tasks, size = 5, 2**25  # bytes of one task's; as many are given back to the system when they are freed
    frames = toy_demonstrations([DRAWER], episodes=1, frames=4).to_list()
    rows = [{**frame, "task": f"task_{number}"} for number in range(tasks) for frame in frames]
    source = toy_demonstrations([DRAWER], episodes=1, frames=4)
    memory = ReplayMemory(datasets.Dataset.from_list(rows, features=source.features)).save(tmp_path / "memory")
    policy = tiny_policy()
    config = InfoVLAConfig(output_dir=str(tmp_path / "run"), use_cpu=True, counterfactual_share=0.0, report_to=[])
    model = add_adapter(policy.model, "one", config)
    current = policy.dataset.like(policy.task("put_the_bowl_on_the_plate"))

    def large_anchors(*_arguments: Any, name: str, rows: Any, views: Any, **_options: Any) -> Anchors:
        shape = (views.count, len(rows))
        affinity = torch.ones(*shape, 16, size // (4 * 16 * shape[0] * shape[1]))
        small = torch.ones(*shape, 4)
        words, shifts = torch.ones(len(rows), dtype=torch.long), torch.zeros(*shape, 2, dtype=torch.long)
        return Anchors(
            small, affinity, small.clone(), small[..., None].clone(), words, shifts, {name: {"rows": str(len(rows))}}
        )

    monkeypatch.setattr(rehearsal, "compute_anchors", large_anchors)
    prepared = rehearsal.Rehearsal(model, config, current, policy.collator, memory=memory)
    highest = before = resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        anchors = prepared.prepare(batch_size=4)
    finally:
        done.set()
        watcher.join()
    assert anchors is not None
    assert anchors.affinity.nbytes == tasks * size
    assert anchors.affinity.min() == 1
    assert max(highest, resident_bytes()) - before < 3 * size
    assert ReplayMemory.load(tmp_path / "memory").anchors is not None
    assert not list((tmp_path / "run").iterdir())


# --- stratified batches ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def current() -> ChunkDataset:
    pipeline = ImagePipeline(OpenVLAImageProcessor(input_sizes=[(3, 32, 32)]))
    return ChunkDataset(toy_demonstrations([BOWL], episodes=3), pipeline)


@pytest.fixture(scope="module")
def memory(current: ChunkDataset) -> ChunkDataset:
    return current.like(toy_demonstrations([DRAWER, STOVE], episodes=1))


def test_a_fixed_share_of_replay_spread_over_the_tasks(current: ChunkDataset, memory: ChunkDataset) -> None:
    sampler = StratifiedBatchSampler(current, memory, batch_size=8, replay_fraction=0.5, batches=50, seed=0)
    draws = list(sampler)
    assert len(draws) == len(sampler) == 50
    for draw in draws:
        assert (len(draw.current), len(draw.replay.own), len(draw.replay.peers)) == (4, 4, 0)
        tasks = memory.task[draw.replay.own[:, 1]]
        assert np.bincount(tasks, minlength=2).tolist() == [2, 2]
    assert {row for draw in draws for row in draw.replay.own[:, 1]} == set(range(len(memory)))


def test_current_samples_are_used_equally_often(current: ChunkDataset, memory: ChunkDataset) -> None:
    sampler = StratifiedBatchSampler(current, memory, batch_size=8, replay_fraction=0.5, batches=27, seed=0)
    rows = np.concatenate([draw.current for draw in sampler])  # 108 = three times 36
    assert np.bincount(rows).tolist() == [3] * 36
    assert sorted(rows[:36]) == list(range(36))
    assert rows[:36].tolist() != rows[36:72].tolist()


def same(first: Draw, second: Draw) -> bool:
    return all(
        np.array_equal(one, other)
        for one, other in (
            (first.current, second.current),
            (first.replay.own, second.replay.own),
            (first.shifts, second.shifts),
        )
    )


def test_a_batch_depends_on_seed_and_number_alone(current: ChunkDataset, memory: ChunkDataset) -> None:
    def sampler(seed: int) -> StratifiedBatchSampler:
        return StratifiedBatchSampler(
            current, memory, batch_size=8, replay_fraction=0.5, batches=20, seed=seed, augmentation=Augmentation(4)
        )

    draws = list(sampler(1))
    assert same(sampler(1).draw(17), draws[17])
    assert not same(sampler(2).draw(17), draws[17])
    assert not same(draws[16], draws[17])


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("batch_size", [3, 4, 5])
def test_two_processes_share_the_batch_of_one(
    current: ChunkDataset, memory: ChunkDataset, batch_size: int, candidates: int
) -> None:
    def draw(size: int, processes: int, rank: int) -> Draw:
        return StratifiedBatchSampler(
            current, memory, batch_size=size, replay_fraction=0.5, batches=9, seed=3, processes=processes, rank=rank,
            augmentation=Augmentation(4, 0.1), candidates=candidates,
        ).draw(7)  # fmt: skip

    one, parts = draw(2 * batch_size, 1, 0), [draw(batch_size, 2, rank) for rank in (0, 1)]
    assert sorted(one.current) == sorted(np.concatenate([part.current for part in parts]))
    for part, other in (parts, parts[::-1]):
        assert len(part.shifts) == len(part.current) + len(part.replay.own)
        assert len(part.current) + len(part.replay.own) / candidates == batch_size
        np.testing.assert_array_equal(part.replay.peers, other.replay.own)
    replayed = np.concatenate([part.replay.own for part in parts])
    assert sorted(replayed.tolist()) == sorted(one.replay.own.tolist())
    pairs = [(*shift, *noise) for draw in parts for shift, noise in zip(draw.shifts, draw.proprio_noise, strict=True)]
    assert sorted(pairs) == sorted((*s, *n) for s, n in zip(one.shifts, one.proprio_noise, strict=True))


def test_samples_with_anchors_show_the_views_that_have_them(current: ChunkDataset, memory: ChunkDataset) -> None:
    views = Views.draw(memory, 2, Augmentation(4, 0.1), seed=0)
    sampler = StratifiedBatchSampler(
        current, memory, batch_size=8, replay_fraction=0.5, batches=20, seed=0,
        augmentation=Augmentation(4, 0.1), views=views,
    )  # fmt: skip
    for draw in sampler:
        chosen = tuple(draw.replay.own.T)
        assert draw.proprio_noise is not None
        np.testing.assert_array_equal(draw.shifts[4:], views.shifts[chosen])
        np.testing.assert_array_equal(draw.proprio_noise[4:], views.proprio_noise[chosen])
        assert draw.proprio_noise[:4].all()


def test_the_views_of_a_task_do_not_depend_on_the_others(current: ChunkDataset, memory: ChunkDataset) -> None:
    augmentation = Augmentation(4, 0.1)
    both, alone = (
        Views.draw(data, 3, augmentation, 7)
        for data in (memory, current.like(toy_demonstrations([STOVE], episodes=1)))
    )
    np.testing.assert_array_equal(both.rows(np.flatnonzero(memory.task == 1)).shifts, alone.shifts)
    assert not both.shifts[0].any()
    assert not both.proprio_noise[0].any()
    assert np.abs(both.shifts).max() == 4
    assert Views.draw(memory, 3, augmentation, 7, plain=False).shifts[0].any()
    assert (Views.draw(memory, 3, augmentation, 8).shifts != both.shifts).any()


# --- counterfactual frames -------------------------------------------------------------------------------------------


def test_counterfactual_frames_are_the_current_ones_under_old_instructions(current: ChunkDataset) -> None:
    old = {DRAWER: TASKS[DRAWER], STOVE: TASKS[STOVE]}
    data = CounterfactualDataset(current, old, frames=50, seed=0)  # more than the 36 that there are
    assert np.bincount(data.task).tolist() == [25, 25]
    assert set(data.rows.tolist()) == set(range(36))
    rows = [0, 30, 49]
    samples, source = data.__getitems__(rows), current.__getitems__(data.rows[rows])
    assert samples.instructions == [TASKS[DRAWER], TASKS[STOVE], TASKS[STOVE]]
    np.testing.assert_array_equal(samples.images, source.images)
    np.testing.assert_array_equal(samples.states, source.states)
    answers = np.random.default_rng(0).normal(size=(50, 8, 7)).astype(np.float32)
    data.answer(answers)
    np.testing.assert_array_equal(data.__getitems__(rows).actions, answers[rows])
    # A frame under two instructions is two trajectories, so that one is a negative of the other.
    moments = {
        (row, task): trajectory for row, task, trajectory in zip(data.rows, data.task, data.trajectory, strict=True)
    }
    assert all(moments[row, 0] != moments[row, 1] for row in range(36) if (row, 0) in moments and (row, 1) in moments)
    with pytest.raises(ValueError, match="counterfactual_frames must be at least 2"):
        CounterfactualDataset(current, old, frames=1, seed=0)


@pytest.mark.parametrize("remembers", [True, False])
def test_counterfactual_frames_have_their_share_of_the_replay(
    current: ChunkDataset, memory: ChunkDataset, remembers: bool
) -> None:
    data = CounterfactualDataset(current, {DRAWER: TASKS[DRAWER], STOVE: TASKS[STOVE]}, frames=20, seed=0)
    tables = [memory, data] if remembers else [data]
    first = len(memory) if remembers else 0
    draws = list(
        StratifiedBatchSampler(
            current, memory if remembers else None, batch_size=16, replay_fraction=0.5, batches=200, seed=0,
            counterfactual=data, counterfactual_share=0.25,
        )
    )  # fmt: skip
    for draw in draws:
        rows = draw.replay.own[:, 1]
        assert (rows >= first).tolist() == [False] * (6 if remembers else 0) + [True] * (2 if remembers else 8)
        samples = ReplayMixture(current, tables).__getitems__(draw)
        expected = [data.states[row - first] if row >= first else memory.states[row] for row in rows]
        np.testing.assert_array_equal(samples.states[8:], expected)
    assert {row - first for draw in draws for row in draw.replay.own[:, 1] if row >= first} == set(range(20))


def test_few_replay_samples(current: ChunkDataset, memory: ChunkDataset) -> None:
    def sampler(batch_size: int, fraction: float, memory: ChunkDataset | None = memory) -> StratifiedBatchSampler:
        return StratifiedBatchSampler(
            current, memory, batch_size=batch_size, replay_fraction=fraction, batches=2, seed=0
        )

    assert sampler(8, 0.01).replay_size == 2  # two tasks are remembered
    assert sampler(8, 0.0).replay_size == 0
    assert sampler(8, 0.5, None).replay_size == 0
    with pytest.raises(ValueError, match="larger batches or a smaller replay_fraction"):
        sampler(2, 0.5)


def test_a_mixture_puts_replay_last(current: ChunkDataset, memory: ChunkDataset) -> None:
    sampler = StratifiedBatchSampler(current, memory, batch_size=6, replay_fraction=0.5, batches=1, seed=0)
    draw = sampler.draw(0)
    samples = ReplayMixture(current, [memory]).__getitems__(draw)
    np.testing.assert_array_equal(samples.states[:3], current.states[draw.current])
    np.testing.assert_array_equal(samples.states[3:], memory.states[draw.replay.own[:, 1]])
    assert samples.instructions[:3] == [TASKS[BOWL]] * 3
    assert samples.replay is draw.replay
    assert samples.shifts is None


def test_stages_take_turns_and_within_each_its_tasks(current: ChunkDataset) -> None:
    memory = current.like(toy_demonstrations([BOWL, DRAWER, STOVE], episodes=1))

    def counts(batch_size: int, stages: dict[str, str | None] | None) -> list[list[int]]:
        sampler = StratifiedBatchSampler(
            current, memory, batch_size=batch_size, replay_fraction=0.5, batches=40, seed=0, stages=stages
        )
        return [np.bincount(memory.task[draw.replay.own[:, 1]], minlength=3).tolist() for draw in sampler]

    late = memory.tasks[2]
    by_stage = counts(16, {late: "stage_01"})
    assert all(row[2] == 4 and sorted(row[:2]) == [2, 2] for row in by_stage)  # the base's two tasks share one half
    by_task = counts(16, None)
    assert all(sorted(row) == [2, 3, 3] for row in by_task)
    assert all(sorted(row) == [2, 3, 3] for row in counts(16, {}))  # one stage alone: its tasks take turns
    few = counts(4, {late: "stage_01"})
    assert all(row[2] == 1 and sum(row) == 2 for row in few)
    assert {tuple(row) for row in few} == {(1, 0, 1), (0, 1, 1)}


def test_the_seed_decides_the_order_of_the_current_task(current: ChunkDataset) -> None:
    orders = [
        [
            int(row)
            for draw in StratifiedBatchSampler(
                current, None, batch_size=6, replay_fraction=0.0, batches=len(current) // 6, seed=seed
            )
            for row in draw.current
        ]
        for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def test_every_view_is_drawn(current: ChunkDataset, memory: ChunkDataset) -> None:
    views = Views.draw(memory, 3, Augmentation(4), seed=0)
    sampler = StratifiedBatchSampler(
        current, memory, batch_size=8, replay_fraction=0.5, batches=20, seed=0, views=views
    )
    assert {int(view) for draw in sampler for view in draw.replay.own[:, 0]} == {0, 1, 2}


def test_each_task_has_the_larger_share_in_turn(current: ChunkDataset, memory: ChunkDataset) -> None:
    sampler = StratifiedBatchSampler(current, memory, batch_size=6, replay_fraction=0.5, batches=40, seed=0)
    larger = {int(np.bincount(memory.task[draw.replay.own[:, 1]], minlength=2).argmax()) for draw in sampler}
    assert larger == {0, 1}


def test_a_memory_replaces_nothing_but_a_memory(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds what a memory does not \(thesis.tex\)"):
        ReplayMemory().save(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
