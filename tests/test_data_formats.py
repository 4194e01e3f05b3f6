"""Demonstrations in LIBERO's HDF5, LeRobot v3 and our own format: read, streamed, refused, and exported."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import libero_installed
from data_files import FRAMES, SIDE, TASKS, numbers, picture, png, write_lerobot, write_libero_hdf5
from test_demonstrations import write as write_recorded

from infovla_peft.cli import main
from infovla_peft.data import lerobot, recording, rows
from infovla_peft.data.chunks import ChunkDataset
from infovla_peft.data.demonstrations import DemonstrationError, load_demonstrations
from infovla_peft.data.lerobot import LeRobotSource, read_frames
from infovla_peft.data.lerobot_export import export_lerobot
from infovla_peft.data.lerobot_statistics import ChannelHistogram, Moments
from infovla_peft.data.rows import noops
from infovla_peft.data.statistics import statistics_of

WRITERS: dict[str, Callable[[Path], Path]] = {
    "hdf5": write_libero_hdf5,
    "lerobot_videos": write_lerobot,
    "lerobot_images": lambda folder: write_lerobot(folder, videos=False),
}
VIDEO_ERROR = 24
"""Largest difference of a colour value after H.264, at the edge of the pictures' corner."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    return {name: write(root / name) for name, write in WRITERS.items()}


def largest_difference(found: Any, wanted: Any) -> int:
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(wanted).astype(int)).max())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(files: dict[str, Path], name: str, streaming: bool) -> None:
    frames = load_demonstrations(files[name], [TASKS[1], "turn on the stove"], streaming=streaming)
    assert isinstance(frames, datasets.IterableDataset if streaming else datasets.Dataset)
    rows = list(frames)
    assert [row["task"] for row in rows] == [TASKS[1]] * 2 * FRAMES + [TASKS[0]] * 2 * FRAMES
    assert {row["instruction"] for row in rows[: 2 * FRAMES]} == {"put the bowl on the plate"}
    for place, row in enumerate(rows):
        task, episode, frame = 1 - place // (2 * FRAMES), place // FRAMES % 2, place % FRAMES
        assert (row["episode_index"], row["frame_index"], row["done"]) == (episode, frame, frame == FRAMES - 1)
        states, actions = numbers(10 * task + episode)
        np.testing.assert_array_equal(np.float32(row["state"]), states[frame])
        np.testing.assert_array_equal(np.float32(row["action"]), actions[frame])
        for camera, column in enumerate(("image", "wrist_image")):  # upright, whatever lay in the file
            difference = largest_difference(row[column], picture(10 * task + episode, frame, camera))
            assert difference <= (VIDEO_ERROR if name == "lerobot_videos" else 0)


def test_our_own_recordings_are_streamed_with_all_their_columns(tmp_path: Path, monkeypatch: Any) -> None:
    from test_demonstrations import FakeDemonstrator

    monkeypatch.setattr(recording, "Demonstrator", FakeDemonstrator)
    write_recorded(tmp_path)
    mapped = load_demonstrations(tmp_path, ["b"], episodes=2)
    streamed = list(load_demonstrations(tmp_path, ["b"], episodes=2, streaming=True))
    assert mapped.column_names == list(streamed[0])
    assert len(mapped) == len(streamed)
    for ours, theirs in zip(mapped, streamed, strict=True):
        assert largest_difference(ours.pop("image"), theirs.pop("image")) == 0
        assert ours == theirs
    with pytest.raises(ValueError, match="leave `columns` out"):
        load_demonstrations(tmp_path, columns={"image": "x"})
    for streaming in (False, True):
        for name, found in (("action", 7), ("state", 8)):
            message = rf"{name} has {found} dimensions, .* not 14: leave {name}_dim out"
            with pytest.raises(DemonstrationError, match=message):
                load_demonstrations(tmp_path, streaming=streaming, **{f"{name}_dim": 14})  # type: ignore[arg-type]
    with pytest.raises(DemonstrationError, match="with LIBERO's gripper: leave `gripper` out"):
        load_demonstrations(tmp_path, gripper=(1, 0))
    fewer = load_demonstrations(tmp_path, ["b"], rotate=True)
    upside_down = load_demonstrations(tmp_path, ["b"])
    assert largest_difference(fewer[0]["image"], np.asarray(upside_down[0]["image"])[::-1, ::-1]) == 0


def test_streaming_reads_an_episode_when_it_is_wanted(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = LeRobotSource.read

    def count(self: LeRobotSource, entry: Any) -> Any:
        read.append(entry.place["episode"])
        return original(self, entry)

    monkeypatch.setattr(LeRobotSource, "read", count)
    stream = load_demonstrations(files["lerobot_videos"], streaming=True)
    assert read == []
    assert stream.num_shards == 4  # the episodes: workers of a DataLoader share them
    rows = iter(stream)
    next(rows)
    assert len(read) == 1
    assert len(list(rows)) == 4 * FRAMES - 1
    assert sorted(read) == [0, 1, 2, 3]


def test_what_is_prepared_is_used_again_until_the_files_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_lerobot(tmp_path / "set", videos=False)
    read: list[int] = []
    original = LeRobotSource.read
    monkeypatch.setattr(
        LeRobotSource,
        "read",
        lambda self, entry: read.append(1) or original(self, entry),  # type: ignore[func-returns-value]
    )
    first = load_demonstrations(folder)
    assert first.cache_files
    assert Path(first.cache_files[0]["filename"]).is_relative_to(tmp_path / "cache")
    load_demonstrations(folder)
    assert len(read) == 4
    path = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "action", pa.array([[0.5] * 7] * len(table))), path)
    assert load_demonstrations(folder)[0]["action"] == [0.5] * 7
    assert len(read) == 8
    # What a version before this one has prepared may have come out otherwise.
    later = dataclasses.make_dataclass("RowOptions", [("version", int, 2)], bases=(rows.RowOptions,), frozen=True)
    monkeypatch.setattr("infovla_peft.data.demonstrations.RowOptions", later)
    load_demonstrations(folder)
    assert len(read) == 12


def test_options_map_columns_turn_pictures_and_leave_out_noops(files: dict[str, Path]) -> None:
    columns = {"image": "obs/eye_in_hand_rgb", "wrist_image": None, "state": ["obs/ee_states", "obs/gripper_states"]}
    options: dict[str, Any] = {"columns": columns, "rotate": False, "drop_noops": True}
    frames = load_demonstrations(files["hdf5"], [TASKS[0]], episodes=1, **options)
    assert "wrist_image" not in frames.column_names
    assert frames["frame_index"] == list(range(FRAMES - 1))
    assert frames["done"] == [False] * (FRAMES - 2) + [True]
    states, actions = numbers(0)
    kept = [frame for frame in range(FRAMES) if frame != 1]
    np.testing.assert_array_equal(np.float32(frames["action"]), actions[kept])
    np.testing.assert_array_equal(np.float32(frames["state"]), states[kept])
    for row, frame in zip(frames, kept, strict=True):
        assert largest_difference(row["image"], picture(0, frame, 1)[::-1, ::-1]) == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_seen_after_an_action_belongs_to_the_next_one(tmp_path: Path, streaming: bool) -> None:
    def load(after: bool | None, observations: Any = "auto") -> tuple[list[Any], list[Any], list[Any]]:
        folder = tmp_path / str(after)
        if not folder.exists():
            write_libero_hdf5(folder, [TASKS[0]], episodes=1, after=after)
        rows = list(load_demonstrations(folder, streaming=streaming, observations=observations))
        assert [row["done"] for row in rows] == [False] * (len(rows) - 1) + [True]
        columns = (np.float32([row[name] for row in rows]).tolist() for name in ("state", "action"))
        return (*columns, [np.asarray(row["image"]).tolist() for row in rows])

    states, actions = (column.tolist() for column in numbers(0))
    pictures = [picture(0, frame).tolist() for frame in range(FRAMES)]
    as_stored, shifted = (states, actions, pictures), (states[:-1], actions[1:], pictures[:-1])
    assert load(True) == load(True, "after") == load(False, "after") == shifted
    assert load(False) == load(None) == load(True, "before") == as_stored


def test_observations_after_the_action_are_of_hdf5_only(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="HDF5 files only"):
        load_demonstrations(files["lerobot_images"], observations="after")
    with pytest.raises(ValueError, match="choose auto, before or after"):
        load_demonstrations(files["hdf5"], observations="later")  # type: ignore[arg-type]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("opened", "closed"), [(1, 0), (0, 100), (1, -1)])
def test_a_gripper_of_other_numbers_becomes_libero_s(
    tmp_path: Path, opened: float, closed: float, streaming: bool
) -> None:
    folder = write_lerobot(tmp_path / "set", videos=False)
    actions = np.array(pq.read_table(folder / DATA)["action"].to_pylist())
    expected = actions[:, 6].copy()
    actions[:, 6] = np.where(expected < 0, opened, closed)
    edit_table(folder / DATA, action=actions.tolist())
    frames = load_demonstrations(folder, gripper=(opened, closed), streaming=streaming)
    assert [row["action"][6] for row in frames] == expected.tolist()
    if (opened, closed) != (1, -1):  # which looks like LIBERO's
        with pytest.raises(DemonstrationError, match=r"the gripper, .* load_demonstrations\(\.\.\., gripper="):
            statistics_of(load_demonstrations(folder))  # type: ignore[arg-type]
    overshot = actions.copy()
    overshot[0, 6] += np.sign(overshot[0, 6] - (opened + closed) / 2) * abs(opened - closed) / 10
    edit_table(folder / DATA, action=overshot.tolist())
    frames = load_demonstrations(folder, gripper=(opened, closed), streaming=streaming)
    assert [row["action"][6] for row in frames] == expected.tolist()
    with pytest.raises(ValueError, match=r"gripper is two different numbers, .* not \(1, 1\)"):
        load_demonstrations(folder, gripper=(1, 1), streaming=streaming)


def test_noops_follow_openvla_s_rule() -> None:
    still, moves = np.zeros(6), np.full(6, 0.1)
    actions = np.array([[*still, -1], [*moves, -1], [*still, 1], [*still, 1], [*still * 1e-6, -1], [*moves, -1]])
    assert noops(actions).tolist() == [True, False, False, True, False, False]


def test_options_that_cannot_be(files: dict[str, Path]) -> None:
    for source in (files["hdf5"], files["lerobot_images"]):
        with pytest.raises(ValueError, match="names an image 'done', as a column is called already"):
            load_demonstrations(source, columns={"done": "obs/agentview_rgb"}, streaming=True)
        for names, message in (
            (["obs/agentview_rgb", "obs/eye_in_hand_rgb"], r"has 2 names for the image 'image' .*Give it one"),
            ([], "has 0 names for the image 'image'"),
        ):
            with pytest.raises(ValueError, match=message):
                load_demonstrations(source, columns={"image": names})
        with pytest.raises(ValueError, match="there are no revisions; leave `revision` out"):
            load_demonstrations(source, revision="v1", streaming=True)


def test_two_files_of_one_task_are_not_mixed(tmp_path: Path) -> None:
    for name in ("libero_goal", "libero_goal_no_noops"):
        write_libero_hdf5(tmp_path / "sets" / name, TASKS[:1] if name.endswith("noops") else TASKS)
    message = f"'{TASKS[0]}' twice, in libero_goal/{TASKS[0]}_demo.hdf5 and in libero_goal_no_noops/.* give the folder"
    for tasks in (None, TASKS[0]):
        with pytest.raises(DemonstrationError, match=message):
            load_demonstrations(tmp_path / "sets", tasks, streaming=True)
    assert len(load_demonstrations(tmp_path / "sets", TASKS[1])) == 2 * FRAMES


def test_a_stream_is_no_table_to_train_on(files: dict[str, Path]) -> None:
    stream = load_demonstrations(files["hdf5"], streaming=True)
    with pytest.raises(ValueError, match="a stream has no rows that can be chosen from: call load_demonstrations w"):
        ChunkDataset(stream, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a stream has no rows"):
        statistics_of(stream)  # type: ignore[arg-type]


def test_columns_of_another_robot(tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path, cameras=("observation.images.top",))
    with pytest.raises(
        DemonstrationError, match=r"lacks observation\.images\.image; it has .*observation\.images\.top"
    ):
        load_demonstrations(folder)
    columns = {"image": "observation.images.top", "state": ["observation.state", "action"]}
    with pytest.raises(DemonstrationError, match=r"state has 15 dimensions, not 8.*state_dim=15"):
        load_demonstrations(folder, columns=columns)
    frames = load_demonstrations(folder, columns=columns, state_dim=15, streaming=True)
    row = next(iter(frames))
    states, actions = numbers(0)
    np.testing.assert_array_equal(np.float32(row["state"]), np.r_[states[0], actions[0]])
    with pytest.raises(ValueError, match="leaves out action"):
        load_demonstrations(folder, columns={"image": "observation.images.top", "action": None})


def test_libero_names_are_found_by_their_instruction(files: dict[str, Path]) -> None:
    frames = load_demonstrations(files["lerobot_images"], ["KITCHEN_SCENE3_turn_on_the_stove"], episodes=1)
    assert set(frames["task"]) == {"KITCHEN_SCENE3_turn_on_the_stove"}
    assert set(frames["instruction"]) == {"turn on the stove"}


def test_one_file_and_files_of_other_names(tmp_path: Path) -> None:
    write_libero_hdf5(tmp_path, [TASKS[0]])
    (tmp_path / f"{TASKS[0]}_demo.hdf5").rename(tmp_path / "monday.hdf5")
    frames = load_demonstrations(tmp_path / "monday.hdf5", ["turn on the stove"])
    assert set(frames["task"]) == {"monday"}
    assert set(frames["suite"]) == {"libero_goal"}


# --- what is refused -----------------------------------------------------------------------------------------------


def change(path: Path, edit: Callable[[Any], None]) -> None:
    with h5py.File(path, "r+") as file:
        edit(file["data/demo_1"])


def replace(name: str, value: Any) -> Callable[[Any], None]:
    def edit(demo: Any) -> None:
        del demo[name]
        if value is not None:
            demo[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (replace("actions", None), "lacks actions; it has obs/agentview_rgb"),
        (replace("obs/agentview_rgb", None), "lacks obs/agentview_rgb"),
        (replace("actions", np.zeros((FRAMES, 14))), "action has 14 dimensions, not 7"),
        (replace("actions", np.full((FRAMES, 7), np.nan)), "action holds NaN or infinite values .first in frame 0"),
        (replace("obs/ee_pos", np.full((FRAMES, 3), np.inf)), "state holds NaN"),
        (replace("actions", np.zeros((3, 7))), "state has 6 frames, action has 3"),
        (replace("actions", np.zeros((0, 7))), "holds no frames"),
        (replace("obs/agentview_rgb", np.zeros((FRAMES, 4, 4, 3), np.float32)), "not uint8 pictures"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_broken_hdf5(tmp_path: Path, edit: Callable[[Any], None], message: str, streaming: bool) -> None:
    path = write_libero_hdf5(tmp_path, [TASKS[0]]) / f"{TASKS[0]}_demo.hdf5"
    change(path, edit)
    with pytest.raises(DemonstrationError, match=message) as error:
        list(load_demonstrations(tmp_path, streaming=streaming))
    assert str(path) in str(error.value)
    assert "demo_1" in str(error.value)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = write_libero_hdf5(tmp_path, [TASKS[0]]) / f"{TASKS[0]}_demo.hdf5"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DemonstrationError, match="truncated or no HDF5 file"):
        load_demonstrations(tmp_path)
    with h5py.File(path, "w") as file:
        file["other"] = 1
    with pytest.raises(DemonstrationError, match="no group 'data' that can be read, only"):
        load_demonstrations(tmp_path)
    with h5py.File(path, "w") as file:
        file.create_group("data")
    with pytest.raises(DemonstrationError, match="holds no demonstration"):
        load_demonstrations(tmp_path)


def with_string_actions(file: Any) -> None:
    del file["data/demo_0/actions"]
    file["data/demo_0/actions"] = ["left"] * FRAMES


def with_a_dataset_for(name: str) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        del file[name]
        file[name] = np.zeros(3)

    return edit


def linked(link: Any, name: str = "data/demo_0/actions") -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        del file[name]
        file[name] = link

    return edit


def with_external_storage(file: Any) -> None:
    del file["data/demo_0/actions"]
    place = (str(Path(file.filename).with_name("secret.bin")), 0, FRAMES * 7 * 8)
    file["data/demo_0"].create_dataset("actions", (FRAMES, 7), np.float64, external=[place])


def with_a_virtual_dataset(file: Any) -> None:
    del file["data/demo_0/actions"]
    layout = h5py.VirtualLayout((FRAMES, 7), np.float64)
    layout[:] = h5py.VirtualSource(str(Path(file.filename).with_name("other.hdf5")), "x", (FRAMES, 7))
    file["data/demo_0"].create_virtual_dataset("actions", layout)


def with_shape(name: str, shape: tuple[int, ...], dtype: Any) -> Callable[[Any], None]:
    def edit(file: Any) -> None:
        del file[f"data/demo_0/{name}"]
        file["data/demo_0"].create_dataset(name, shape, dtype, chunks=(1, *shape[1:]))

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (with_a_dataset_for("data"), "has no group 'data' that can be read"),
        (with_a_dataset_for("data/demo_0"), "has no group 'data/demo_0' that can be read"),
        (with_string_actions, "actions holds .*, not numbers: get the file again"),
        (lambda file: file.create_group(f"data/demo_{'9' * 5000}"), "numbers a demonstration demo_999"),
        (linked(h5py.ExternalLink("other.hdf5", "x")), "is damaged .actions is a link to another file"),
        (linked(h5py.ExternalLink("other.hdf5", "x"), "data"), "is damaged .data is a link to another file"),
        (linked(h5py.SoftLink("/elsewhere/x")), "lacks actions"),
        (linked(h5py.SoftLink("/data/demo_0/actions")), "is a link to another file, or to nothing"),
        (with_external_storage, "actions is stored in another file, which is not read"),
        (with_a_virtual_dataset, "actions is stored in another file, which is not read"),
        (with_shape("actions", (10**6 + 1, 7), np.float32), "more than 1,000,000 frames"),
        (with_shape("obs/agentview_rgb", (40_000, 256, 256, 3), np.uint8), "more than .* 4 GiB"),
    ],
)
def test_hdf5_files_that_are_made_up(tmp_path: Path, edit: Callable[[Any], Any], message: str) -> None:
    path = write_libero_hdf5(tmp_path, [TASKS[0]], 1) / f"{TASKS[0]}_demo.hdf5"
    (tmp_path / "secret.bin").write_bytes(bytes(FRAMES * 7 * 8))
    with h5py.File(tmp_path / "other.hdf5.elsewhere", "w") as other:
        other["x"] = np.zeros((FRAMES, 7))
    (tmp_path / "other.hdf5.elsewhere").rename(tmp_path / "other.hdf5")
    with h5py.File(path, "r+") as file:
        edit(file)
    with pytest.raises(DemonstrationError, match=message) as error:
        list(load_demonstrations(path, streaming=True))
    assert str(path) in str(error.value)


def test_no_file_is_opened_by_a_link_in_another(tmp_path: Path) -> None:
    """Not even to look: it may be a pipe, and opening that waits for ever."""
    import os

    path = write_libero_hdf5(tmp_path, [TASKS[0]], 1) / f"{TASKS[0]}_demo.hdf5"
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/eye_in_hand_rgb"]
        file["data/demo_0/obs/eye_in_hand_rgb"] = h5py.SoftLink("/far/x")
        file["far"] = h5py.ExternalLink(str(tmp_path / "pipe"), "/")
    with pytest.raises(DemonstrationError, match="obs/eye_in_hand_rgb is a link to another file"):
        load_demonstrations(path, streaming=True)


def test_links_within_a_file_are_followed(tmp_path: Path) -> None:
    path = write_libero_hdf5(tmp_path, [TASKS[0]], 1) / f"{TASKS[0]}_demo.hdf5"
    with h5py.File(path, "r+") as file:
        file.move("data/demo_0/obs", "kept")
        file["data/demo_0/obs"] = h5py.SoftLink("/kept")
    rows = list(load_demonstrations(path, streaming=True))
    assert len(rows) == FRAMES
    assert "wrist_image" in rows[0]


def cut(path: Path, keep: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edit_table(path: Path, **columns: Any) -> None:
    table = pq.read_table(path)
    for key, values in columns.items():
        name = key.replace("__", ".")
        table = (
            table.drop([name])
            if values is None
            else table.set_column(table.column_names.index(name), name, pa.array(values))
        )
    pq.write_table(table, path)


def edit_info(root: Path, **values: Any) -> None:
    file = root / "meta" / "info.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


DATA, EPISODES = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.image/chunk-000/file-000.mp4"
ROWS = 4 * FRAMES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: cut(root / DATA), "truncated or no Parquet"),
        (lambda root: (root / DATA).unlink(), "is missing: the data set is not complete"),
        (lambda root: cut(root / EPISODES), "truncated or no Parquet"),
        (lambda root: cut(root / VIDEO), "truncated or no video|has no frame at"),
        (lambda root: (root / VIDEO).unlink(), "is missing"),
        (lambda root: edit_table(root / DATA, action=None), "lacks the columns action"),
        (lambda root: edit_table(root / DATA, action=[[0.0] * 6] * ROWS), "action has 6 dimensions, not 7"),
        (lambda root: edit_table(root / DATA, action=[[np.nan] * 7] * ROWS), "action holds NaN"),
        (lambda root: edit_table(root / DATA, observation__state=[[np.inf] * 8] * ROWS), "state holds NaN"),
        (lambda root: pq.write_table(pq.read_table(root / DATA).slice(0, 20), root / DATA), "instead of 6"),
        (lambda root: (root / "meta/info.json").write_text("{"), r"info\.json is no valid JSON.*it is damaged"),
        (lambda root: (root / "meta/info.json").write_text("{}"), r"info\.json: codebase_version must be a string"),
        (
            lambda root: (root / "meta/info.json").write_text('{"codebase_version": "v2.1"}'),
            r"format v2\.1, read here is v3\.0: convert",
        ),
        (lambda root: edit_info(root, codebase_version="v4.0"), r"format v4\.0, read here is v3\.0: update infovla-"),
        (lambda root: edit_info(root, fps=0), "fps must be a number from 0.01"),
        (lambda root: edit_info(root, fps="abc"), "fps must be a number"),
        (lambda root: edit_info(root, fps=[10]), "fps must be a number"),
        (lambda root: edit_info(root, total_episodes="abc"), "total_episodes must be an integer"),
        (lambda root: edit_info(root, total_episodes=None), "total_episodes must be an integer"),
        (lambda root: edit_info(root, chunks_size="$(touch x)"), "chunks_size must be an integer"),
        (lambda root: edit_info(root, features={"action": {"shape": [7]}}), "dtype must be a string, got None"),
        (lambda root: edit_info(root, video_path=None), "video_path is None"),
        (lambda root: edit_info(root, data_path="x" * 400), "x is missing"),
        (lambda root: edit_table(root / EPISODES, tasks=[[b"\xff\xfe"]] * 4), "tasks.0. must be a string"),
        (lambda root: edit_table(root / EPISODES, length=[None] * 4), "length must be an integer"),
        (lambda root: edit_table(root / EPISODES, length=["6"] * 4), "length must be an integer"),
        (lambda root: edit_table(root / DATA, episode_index=["0"] * ROWS), "holds 0 frames of episode 0"),
        (lambda root: edit_table(root / DATA, action=[[0.0] * (6 + i % 2) for i in range(ROWS)]), "different lengths"),
        (lambda root: edit_table(root / DATA, action=["left"] * ROWS), "could not convert string to float"),
    ],
)
def test_broken_lerobot(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(write_lerobot(tmp_path))
    with pytest.raises(DemonstrationError, match=message):
        list(load_demonstrations(tmp_path, streaming=True))


def test_text_that_is_no_unicode(tmp_path: Path) -> None:
    path = write_lerobot(tmp_path) / EPISODES
    table = pq.read_table(path)
    texts = pa.array([[b"\xff\xfe"]] * len(table)).cast(pa.list_(pa.binary())).flatten()
    text = pa.StringArray.from_buffers(len(texts), *texts.buffers()[1:])
    lists = pa.ListArray.from_arrays(pa.array(range(len(table) + 1), pa.int32()), text)
    pq.write_table(table.set_column(table.column_names.index("tasks"), "tasks", lists), path)
    with pytest.raises(DemonstrationError, match=r"file-000\.parquet is truncated or no Parquet file .*can't decode"):
        load_demonstrations(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "image of frame 2 is no picture"),
        (None, "image of frame 2 is no picture"),
        (png(picture(0, 0))[:60], "image of frame 2 is no picture"),
        (png(np.zeros((1, (1 << 24) + 1, 3), np.uint8)), "pixels are more than"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_stored_pictures_that_are_none(tmp_path: Path, content: bytes | None, message: str, streaming: bool) -> None:
    """And a path beside them is not followed, which `datasets` would do."""
    path = write_lerobot(tmp_path / "set", videos=False) / DATA
    (tmp_path / "private.png").write_bytes(png(picture(0, 0)))
    rows = pq.read_table(path).to_pylist()
    for row in rows[2:]:
        row["observation.images.image"] = {"bytes": content, "path": str(tmp_path / "private.png")}
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DemonstrationError, match=message):
        list(load_demonstrations(tmp_path / "set", streaming=streaming))


def test_the_path_of_a_stored_picture_is_not_followed(tmp_path: Path) -> None:
    path = write_lerobot(tmp_path / "set", videos=False) / DATA
    (tmp_path / "private.png").write_bytes(png(np.full((SIDE, SIDE, 3), 7, np.uint8)))
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["observation.images.image"]["path"] = str(tmp_path / "private.png")
    pq.write_table(pa.Table.from_pylist(rows), path)
    for row in load_demonstrations(tmp_path / "set", streaming=True):
        assert np.asarray(row["image"]).max() > 7


def test_parquet_says_what_it_holds_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lerobot(tmp_path)
    monkeypatch.setattr(lerobot, "MOST_ROWS", ROWS - 1)
    with pytest.raises(DemonstrationError, match=rf"it holds {ROWS} rows of .* read are up to {ROWS - 1} of"):
        list(load_demonstrations(tmp_path, streaming=True))
    monkeypatch.setattr(lerobot, "MOST_ROWS", ROWS)
    monkeypatch.setattr(lerobot, "MOST_BYTES", 100)
    with pytest.raises(DemonstrationError, match="cut the set into more files"):
        load_demonstrations(tmp_path)


def test_what_is_not_there(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DemonstrationError, match="no demonstrations of 'fly', only of"):
        load_demonstrations(files["hdf5"], ["fly"])
    with pytest.raises(DemonstrationError, match="holds 2 demonstrations of 'turn_on_the_stove', not 3"):
        load_demonstrations(files["lerobot_images"], [TASKS[0]], episodes=3)
    with pytest.raises(FileNotFoundError, match="holds no demonstrations"):
        load_demonstrations(tmp_path)
    with pytest.raises(FileNotFoundError, match="no demonstrations at"):
        load_demonstrations(tmp_path / "absent")
    with pytest.raises(ValueError, match="unknown format 'rlds'"):
        load_demonstrations(files["hdf5"], format="rlds")  # type: ignore[arg-type]


# --- what is exported ------------------------------------------------------------------------------------------------


def test_an_export_is_read_back_and_has_lerobot_s_fields(files: dict[str, Path], tmp_path: Path) -> None:
    exported = export_lerobot(load_demonstrations(files["hdf5"], streaming=True), tmp_path / "set")
    back = load_demonstrations(exported)
    original = load_demonstrations(files["hdf5"])
    assert len(back) == len(original) == ROWS
    for ours, theirs in zip(original, back, strict=True):
        for name in ("state", "action", "instruction", "task", "episode_index", "frame_index"):
            assert ours[name] == theirs[name]
        for name in ("image", "wrist_image"):
            assert largest_difference(ours[name], theirs[name]) <= VIDEO_ERROR

    info = json.loads((exported / "meta" / "info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["robot_type"]) == ("v3.0", 20, "panda")
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, ROWS, 2)
    assert info["splits"] == {"train": "0:4"}
    camera = info["features"]["observation.images.image2"]
    assert (camera["dtype"], camera["shape"]) == ("video", [SIDE, SIDE, 3])
    assert camera["info"]["video.codec"] == "h264"
    assert info["features"]["action"]["shape"] == [7]
    tasks = pq.read_table(exported / "meta" / "tasks.parquet").to_pandas()
    assert tasks.task_index.to_dict() == {"put the bowl on the plate": 0, "turn on the stove": 1}

    entries = pq.read_table(exported / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    assert [entry["length"] for entry in entries] == [FRAMES] * 4
    assert [entry["dataset_from_index"] for entry in entries] == [0, FRAMES, 2 * FRAMES, 3 * FRAMES]
    place = "videos/observation.images.image"
    assert entries[2][f"{place}/from_timestamp"] == entries[1][f"{place}/to_timestamp"] == 2 * FRAMES / 20
    _, actions = numbers(10)  # the bowl comes first, by the files' names
    assert entries[0]["stats/action/mean"] == pytest.approx(actions.astype(np.float64).mean(axis=0).tolist())
    assert entries[0]["stats/action/count"] == [FRAMES]
    statistics = json.loads((exported / "meta" / "stats.json").read_text())
    assert set(statistics) == set(info["features"])
    assert np.shape(statistics["observation.images.image"]["mean"]) == (3, 1, 1)
    stored = datasets.Dataset.from_parquet(
        str(exported / DATA), cache_dir=str(tmp_path / "cache"), keep_in_memory=True
    )
    assert stored.features["action"] == datasets.Sequence(datasets.Value("float32"), 7)
    assert stored["index"] == list(range(ROWS))


def test_two_scenes_with_one_instruction_are_two_sets(files: dict[str, Path], tmp_path: Path) -> None:
    """LeRobot tells tasks by their words: one set would mix the scenes."""

    def scene(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {**row, "task": f"KITCHEN_SCENE{1 + (index >= ROWS // 2)}_turn_it_on", "instruction": "turn it on"}

    rows = load_demonstrations(files["hdf5"]).map(scene, with_indices=True)
    with pytest.raises(DemonstrationError, match=r"have the same instruction, 'turn it on', .* two data sets"):
        export_lerobot(rows, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_every_image_column_is_exported(files: dict[str, Path], tmp_path: Path) -> None:
    columns = {"front": "obs/agentview_rgb", "image": None}
    frames = load_demonstrations(files["hdf5"], columns=columns)
    assert {"front", "wrist_image"} <= set(frames.column_names)
    exported = export_lerobot(frames, tmp_path / "set")
    names = {"front": "observation.images.front", "image": None}
    for ours, theirs in zip(frames, load_demonstrations(exported, columns=names), strict=True):
        for name in ("front", "wrist_image"):
            assert largest_difference(ours[name], theirs[name]) <= VIDEO_ERROR
    with pytest.raises(DemonstrationError, match="image2 and wrist_image have the same name"):
        export_lerobot(frames.rename_column("front", "image2"), tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "nonsense"}, "no encoder 'nonsense' here: choose another"),
        ({"frames_per_second": 0}, "must be a positive integer, got 0"),
        ({"frames_per_second": 29.97}, "must be a positive integer, got 29.97"),
    ],
)
def test_an_export_names_the_option_that_cannot_be(
    files: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_lerobot(load_demonstrations(files["hdf5"], streaming=True), tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("codec", ["libsvtav1", "libx265"])
def test_encoders_that_look_ahead_write_later(files: dict[str, Path], tmp_path: Path, codec: str) -> None:
    """LeRobot's own codec gives its first packet after more pictures than a short episode has."""
    frames = load_demonstrations(files["lerobot_images"])
    larger = frames.map(
        lambda row: {"image": row["image"].resize((64, 64)), "wrist_image": row["image"].resize((64, 64))}
    )
    back = load_demonstrations(export_lerobot(larger, tmp_path / "set", codec=codec))
    assert back["action"] == frames["action"]


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_are_found_wherever_a_seek_lands(tmp_path: Path, codec: str) -> None:
    """Where frames are stored in another order than shown, it may land behind the wanted one."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "video.mp4"), "w") as container:
        stream = container.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 2_000_000
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 12, 2
        for number in range(50):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    times = np.arange(50) / 20
    whole = [int(frame.mean()) for frame in read_frames(tmp_path / "video.mp4", times, 20)]
    assert whole == sorted(whole)
    assert len(set(whole)) == 50
    for start in range(50):
        (frame,) = read_frames(tmp_path / "video.mp4", times[start : start + 1], 20)
        assert int(frame.mean()) == whole[start]
    with pytest.raises(DemonstrationError, match=r"has no frame at 2.500 s, only 1 of the 2 frames"):
        read_frames(tmp_path / "video.mp4", np.array([2.45, 2.5]), 20)


def test_a_state_of_one_number_is_a_scalar_to_lerobot(files: dict[str, Path], tmp_path: Path) -> None:
    frames = load_demonstrations(files["lerobot_images"])
    narrow = frames.map(lambda row: {"state": row["state"][:1]}, remove_columns="state")
    exported = export_lerobot(narrow, tmp_path / "set")
    assert json.loads((exported / "meta/info.json").read_text())["features"]["observation.state"]["shape"] == [1]
    assert pq.read_table(exported / DATA).schema.field("observation.state").type == pa.float32()
    assert load_demonstrations(exported, state_dim=1)["state"] == [row[:1] for row in frames["state"]]


def test_large_sets_are_cut_into_files(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infovla_peft.data import lerobot_export

    monkeypatch.setattr(lerobot_export, "DATA_MEGABYTES", 1e-9)
    monkeypatch.setattr(lerobot_export, "VIDEO_MEGABYTES", 0)
    monkeypatch.setattr(lerobot_export, "FILES_PER_CHUNK", 3)
    frames = load_demonstrations(files["lerobot_images"])
    exported = export_lerobot(frames, tmp_path / "set")
    assert len(list(exported.glob("data/chunk-*/file-*.parquet"))) == 4
    assert (exported / "data/chunk-001/file-000.parquet").is_file()
    assert len(list(exported.glob("videos/observation.images.image/chunk-*/file-*.mp4"))) > 1
    back = load_demonstrations(exported)
    assert back["action"] == frames["action"]
    for ours, theirs in zip(frames, back, strict=True):
        assert largest_difference(ours["image"], theirs["image"]) <= VIDEO_ERROR


def test_an_export_that_fails_leaves_what_was_there(files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "set"
    frames = load_demonstrations(files["lerobot_images"])
    export_lerobot(frames.select(range(FRAMES)), target)
    before = (target / "meta" / "info.json").read_text()
    with pytest.raises(DemonstrationError, match="sort the frames"):
        export_lerobot(frames.select([0, 2]), target)
    with pytest.raises(DemonstrationError, match="no pictures"):
        export_lerobot(frames.remove_columns(["image", "wrist_image"]), target)
    with pytest.raises(DemonstrationError, match="no frames"):
        export_lerobot([], target)
    assert (target / "meta" / "info.json").read_text() == before
    assert [path.name for path in tmp_path.glob("*set*")] == ["set"]


def test_an_export_replaces_nothing_but_a_lerobot_set(files: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(files["hdf5"], tmp_path / "source"))
    frames = load_demonstrations(source, streaming=True)
    before = sorted(path.name for path in source.iterdir())
    for target in (source, source / before[0]):
        with pytest.raises(FileExistsError, match="holds no LeRobot data set, so it is not replaced"):
            export_lerobot(frames, target)
    assert sorted(path.name for path in source.iterdir()) == before
    (tmp_path / "empty").mkdir()
    assert export_lerobot(frames, tmp_path / "empty") == export_lerobot(frames, tmp_path / "empty")


@pytest.mark.skipif(not libero_installed(), reason="names of tasks are LIBERO's")
def test_demos_says_before_it_records_that_it_cannot_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "set"
    for options, message in (
        (["--lerobot", str(tmp_path)], "holds no LeRobot data set"),
        (["--lerobot", str(tmp_path / "recorded")], "would replace what is recorded in"),
        (["--lerobot", str(target), "--image_size", "113"], "need an even --image_size, not 113"),
    ):
        (tmp_path / "thesis.tex").touch()
        assert main(["demos", str(tmp_path / "recorded"), "--tasks", "0", *options]) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_statistics_are_exact() -> None:
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    histogram = ChannelHistogram()
    for image in pictures:
        histogram.add(image[None])
    found = histogram.describe()
    values = pictures.reshape(-1, 3) / 255
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(np.ravel(found[name]), getattr(values, name)(axis=0), rtol=1e-12)
    np.testing.assert_allclose(np.ravel(found["q50"]), np.quantile(values, 0.5, axis=0, method="inverted_cdf"))
    moments = Moments()
    moments.add(values[:10])
    moments.add(values[10:])
    assert moments.describe()["std"] == pytest.approx(values.std(axis=0).tolist())


def test_a_source_can_be_sent_to_a_worker(files: dict[str, Path]) -> None:
    from infovla_peft.data.demonstrations import open_source
    from infovla_peft.data.sources import Location

    for path in files.values():
        source = pickle.loads(pickle.dumps(open_source(Location.find(path))))
        assert len(source.read(source.entries()[0])) == FRAMES


def test_a_lerobot_episode_without_an_instruction_is_refused(tmp_path: Path) -> None:
    folder = write_lerobot(tmp_path / "set", tasks=("turn_on_the_stove", ""), videos=False)
    with pytest.raises(DemonstrationError, match=r"episode 1 has no task.*meta/tasks\.parquet"):
        load_demonstrations(folder)


def with_tasks_by_frame(root: Path, numbers: list[Any], tasks: list[str], *, videos: bool = False) -> Path:
    """A set of one episode whose frames have these tasks, of which its entry has a list in no order."""
    write_lerobot(root, episodes=1, videos=videos)
    for file, edit in (
        (EPISODES, lambda row: {**row, "tasks": tasks}),
        (DATA, lambda row: {**row, "task_index": numbers[row["frame_index"]]}),
    ):
        rows = [edit(row) for row in pq.read_table(root / file).to_pylist() if row["episode_index"] == 0]
        pq.write_table(pa.Table.from_pylist(rows), root / file)
    edit_info(root, total_episodes=1)
    return root


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("videos", [False, True])
def test_a_lerobot_episode_of_several_tasks_is_cut_where_they_change(
    tmp_path: Path, videos: bool, streaming: bool
) -> None:
    texts = [task.replace("_", " ") for task in TASKS]
    folder = with_tasks_by_frame(tmp_path / "set", [1, 1, 0, 0, 0, 1], texts, videos=videos)
    found = list(load_demonstrations(folder, streaming=streaming))
    names = ("task", "episode_index", "frame_index", "done")
    assert [tuple(row[name] for name in names) for row in found] == [
        (TASKS[1], 0, 0, False), (TASKS[1], 0, 1, True), (TASKS[1], 1, 0, True),
        (TASKS[0], 0, 0, False), (TASKS[0], 0, 1, False), (TASKS[0], 0, 2, True),
    ]  # fmt: skip
    states, actions = numbers(0)
    for row, frame in zip(found, [0, 1, 5, 2, 3, 4], strict=True):
        assert row["instruction"] == row["task"].replace("_", " ")
        np.testing.assert_array_equal(np.float32(row["state"]), states[frame])
        np.testing.assert_array_equal(np.float32(row["action"]), actions[frame])
        assert largest_difference(row["image"], picture(0, frame)) <= (VIDEO_ERROR if videos else 0)
    assert len(load_demonstrations(folder, TASKS[1], episodes=2)) == 3


@pytest.mark.parametrize("name", [None, "task"])  # of pandas' index, in older and in newer sets
def test_the_task_of_a_lerobot_frame_is_its_own(tmp_path: Path, name: str | None) -> None:
    """An entry may list tasks that no frame has, or none."""
    for number, tasks in enumerate((["a", "b"], [])):
        folder = with_tasks_by_frame(tmp_path / str(number), [1] * FRAMES, tasks)
        table = pq.read_table(folder / "meta/tasks.parquet").to_pandas()
        table.rename_axis(name).to_parquet(folder / "meta/tasks.parquet")
        assert set(load_demonstrations(folder)["task"]) == {TASKS[1]}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "meta/tasks.parquet").unlink(), r"tasks\.parquet is missing"),
        (lambda root: cut(root / "meta/tasks.parquet"), r"tasks\.parquet is truncated"),
        (lambda root: edit_table(root / "meta/tasks.parquet", task_index=[0, None]), "task_index must be an integer"),
        (lambda root: edit_table(root / "meta/tasks.parquet", task_index=None), "lacks the columns task_index"),
        (lambda root: edit_table(root / DATA, task_index=None), "lacks the columns task_index"),
        (
            lambda root: edit_table(root / DATA, task_index=[0, 1, 0, 7, 1, 1]),
            "frames of episode 0 have the task_index 7, which",
        ),
        (lambda root: edit_table(root / DATA, task_index=[0, 1, 0, None, 1, 1]), "the task_index None, which"),
        (lambda root: pq.write_table(pq.read_table(root / DATA).slice(1), root / DATA), "holds 5 frames of episode 0"),
    ],
)
def test_lerobot_tasks_that_are_not_there(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(with_tasks_by_frame(tmp_path, [0, 0, 0, 1, 1, 1], ["a", "b"]))
    with pytest.raises(DemonstrationError, match=message):
        load_demonstrations(tmp_path, streaming=True)
