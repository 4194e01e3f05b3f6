"""Recorded demonstrations as mapped files: hashed once per state, never read if spoiled, one writer at a time."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from infovla_peft.data import mapped, recorded, recording
from infovla_peft.data.demonstrations import DemonstrationError, load_demonstrations
from infovla_peft.data.mapped import prepare_recorded, verify_mapped
from infovla_peft.integrity import sha256_of_state
from infovla_peft.simulation.assets import AssetSet
from infovla_peft.speed.demonstration_set import write_demonstration_set

TASKS, EPISODES, FRAMES = 2, 3, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_demonstration_set(tmp_path / "set", tasks=TASKS, episodes=EPISODES, frames=FRAMES, image_size=8)
    return tmp_path / "set"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed."""
    names: list[str] = []

    def note(path: Path) -> Any:
        names.append(Path(path).name)
        return sha256_of_state(path)

    monkeypatch.setattr(recorded, "sha256_of_state", note)
    monkeypatch.setattr(mapped, "sha256_of_state", note)
    return names


def arrow_files(folder: Path) -> list[Path]:
    return sorted((folder / ".cache").glob("*.arrow"))


def flip(path: Path) -> None:
    """Change one bit, and set the time of modification back."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_first_opening_reads_no_episode(folder: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq, "ParquetFile", lambda *_: pytest.fail("an episode was read"))
    frames = load_demonstrations(folder)
    assert len(frames) == TASKS * EPISODES * FRAMES
    assert {Path(file["filename"]) for file in frames.cache_files} == set(arrow_files(folder))
    assert hashed == []


def test_what_is_mapped_is_what_is_streamed(folder: Path) -> None:
    for tasks, episodes in ((None, None), (["task_001", "task_000"], 2)):
        frames = load_demonstrations(folder, tasks, episodes)
        assert list(frames) == list(load_demonstrations(folder, tasks, episodes, streaming=True))


def test_files_in_another_state_are_hashed_again_and_only_they(folder: Path, hashed: list[str]) -> None:
    os.utime(folder / "task_001" / "episode_000002.parquet")
    load_demonstrations(folder)
    assert hashed == ["episode_000002.parquet"]
    load_demonstrations(folder)
    assert hashed == ["episode_000002.parquet"]


def test_a_copied_set_is_hashed_and_not_made_again(
    folder: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    monkeypatch.setattr(pq.ParquetFile, "read", None)  # not even its numbers
    monkeypatch.setattr(recorded, "check_episode", lambda *_: None)
    assert list(load_demonstrations(copy)) == list(load_demonstrations(folder))
    assert len(hashed) == TASKS * EPISODES + TASKS


@pytest.mark.parametrize("times_kept", [False, True])
def test_an_episode_that_changed_is_found(folder: Path, times_kept: bool) -> None:
    path = folder / "task_000" / "episode_000001.parquet"
    if times_kept:
        flip(path)
    else:
        table = pq.read_table(path)
        pq.write_table(table.set_column(0, "image", table["image"].take(list(range(FRAMES))[::-1])), path)
    with pytest.raises(DemonstrationError, match=r"episode_000001\.parquet is (damaged|truncated)"):
        load_demonstrations(folder)
    assert len(load_demonstrations(folder, ["task_001"])) == EPISODES * FRAMES


@pytest.mark.parametrize(
    "spoil",
    [
        flip,
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".json").write_text("{"),
        lambda path: path.with_suffix(".json").unlink(),
        lambda path: shutil.copy(path.parent / "other.arrow", path),
    ],
    ids=["bit", "truncated", "empty", "missing", "torn index", "no index", "swapped"],
)
def test_a_spoiled_arrow_file_is_made_again(folder: Path, spoil: Any) -> None:
    expected = list(load_demonstrations(folder))
    first, second = arrow_files(folder)
    shutil.copy(second, first.parent / "other.arrow")
    spoil(first)
    assert list(load_demonstrations(folder)) == expected
    assert verify_mapped(folder) == ([first, second], [])


def test_verify_finds_what_the_state_does_not_show(folder: Path) -> None:
    first, second = arrow_files(folder)
    flip(first)
    assert verify_mapped(folder) == ([second], [first])


def test_more_episodes_than_before(folder: Path, tmp_path: Path, hashed: list[str]) -> None:
    cache = tmp_path / "cache"
    assert len(load_demonstrations(folder, episodes=2, cache_dir=cache)) == TASKS * 2 * FRAMES
    assert list(load_demonstrations(folder, cache_dir=cache)) == list(load_demonstrations(folder))
    hashed.clear()
    assert len(load_demonstrations(folder, episodes=1, cache_dir=cache)) == TASKS * FRAMES
    assert hashed == []


def test_a_task_name_does_not_lead_out_of_the_cache(folder: Path, tmp_path: Path) -> None:
    schema = recorded.demonstration_features(["agentview"]).arrow_schema
    pack = mapped._Pack(tmp_path / "cache", "../../task", schema)
    assert pack.arrow.resolve().parent == (tmp_path / "cache").resolve()


def test_several_may_open_an_unprepared_set_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / ".cache")
    written: list[Path] = []
    write = mapped._Pack._write

    def note(pack: Any, wanted: Any) -> Any:
        written.append(pack.arrow)
        return write(pack, wanted)

    monkeypatch.setattr(mapped._Pack, "_write", note)
    threads = [threading.Thread(target=prepare_recorded, args=[folder]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == arrow_files(folder)


def test_what_nobody_asks_for_may_be_gone(folder: Path) -> None:
    """Of a shared set, a recording prepares its own tasks, and of those what is whole."""
    (folder / "task_000" / "episode_000002.parquet").unlink()
    prepare_recorded(folder, {"task_000", "task_001"})
    assert len(load_demonstrations(folder, ["task_000"], 2)) == 2 * FRAMES
    with pytest.raises(DemonstrationError, match=r"episode_000002\.parquet"):
        load_demonstrations(folder, ["task_000"])


def test_one_process_records_into_a_folder_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def record(*_arguments: Any) -> None:
        events.append("begin")
        time.sleep(0.05)
        events.append("end")

    for name in ("libero_folder", "choose_gl", "prepare_recorded"):
        monkeypatch.setattr(recording, name, lambda *_: None)
    monkeypatch.setattr(recording, "_record_missing", record)
    assets = AssetSet("primitive", tmp_path)
    threads = [
        threading.Thread(
            target=recording.record_demonstrations, args=[[], tmp_path], kwargs={"episodes": 1, "assets": assets}
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert events == ["begin", "end"] * 3
