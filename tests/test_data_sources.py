"""Where demonstrations come from: names that stay in their folder, secret tokens, the right scene."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from data_files import TASKS, write_lerobot, write_libero_hdf5
from datasets.fingerprint import Hasher

from infovla_peft.data.demonstrations import DemonstrationError, load_demonstrations
from infovla_peft.data.recorded import DemonstrationManifest, EpisodeRecord, RecordingSettings, TaskRecord
from infovla_peft.data.sources import EpisodeEntry, Location, select_entries

OUTSIDE = ("../secret.txt", "/etc/hostname", "a/../../secret.txt", "C:/secret.txt")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    for location in (Location(tmp_path / "set"), Location(None, "user/name")):
        for ask in (location.file, location.stamp):
            with pytest.raises(DemonstrationError, match="names a file outside itself") as error:
                ask(name)
            assert repr(name) in str(error.value)


def test_a_manifest_and_an_info_file_cannot_name_a_file_outside(tmp_path: Path) -> None:
    manifest = DemonstrationManifest(RecordingSettings("a", "3", 8, ("agentview",), "fast", 0.0, 0))
    record = EpisodeRecord(0, "../secret.parquet", 1, 1, 0)
    manifest.tasks["b"] = TaskRecord("libero_goal", 0, "b", "b", {0: record})
    (tmp_path / "set").mkdir()
    manifest.save(tmp_path / "set")
    with pytest.raises(DemonstrationError, match=r"outside itself, '\.\./secret\.parquet'"):
        load_demonstrations(tmp_path / "set")
    info = write_lerobot(tmp_path / "robot") / "meta" / "info.json"
    original = json.loads(info.read_text())
    for key in ("data_path", "video_path"):
        info.write_text(json.dumps({**original, key: "/etc/hostname"}))
        with pytest.raises(DemonstrationError, match="outside itself, '/etc/hostname'"):
            load_demonstrations(tmp_path / "robot")


@pytest.mark.parametrize(
    "pattern",
    ["{chunk_index.__class__}", "{chunk_index:0999999999d}", "{file_index!r}", "{0}", "{video_key:>999999}", 3, "{"],
)
def test_path_patterns_hold_nothing_but_their_own_fields(tmp_path: Path, pattern: object) -> None:
    info = write_lerobot(tmp_path / "robot") / "meta" / "info.json"
    original = json.loads(info.read_text())
    for key in ("data_path", "video_path"):
        info.write_text(json.dumps({**original, key: pattern}))
        with pytest.raises(DemonstrationError, match=rf"info\.json: {key} is .* no other braces: get the file again"):
            load_demonstrations(tmp_path / "robot")
    info.write_text("[" * 100_000)
    with pytest.raises(DemonstrationError, match=r"info\.json is no valid JSON.*: get the file again"):
        load_demonstrations(tmp_path / "robot")


def test_a_token_is_neither_shown_nor_pickled_nor_hashed() -> None:
    with_token, without = (Location(None, "user/name", token=token) for token in ("hf_SECRET", None))
    assert "hf_SECRET" not in repr(with_token) + str(with_token)
    assert b"hf_SECRET" not in pickle.dumps(with_token)
    assert pickle.loads(pickle.dumps(with_token)) == with_token == without
    assert hash(with_token) == hash(without)
    assert Hasher.hash(with_token) == Hasher.hash(without)
    for same in (copy.deepcopy(with_token), replace(with_token)):
        assert same.token == "hf_SECRET"  # within a process it still opens what is private


def test_the_same_words_in_another_scene_are_another_task(tmp_path: Path) -> None:
    third, ninth = (f"KITCHEN_SCENE{scene}_turn_on_the_stove" for scene in (3, 9))
    write_libero_hdf5(tmp_path / "one", [third], episodes=1)
    for wanted in (ninth, "turn_on_the_stove"):
        with pytest.raises(DemonstrationError, match=rf"no demonstrations of '{wanted}'; .*\['{third}'\]"):
            load_demonstrations(tmp_path / "one", [wanted])
    assert set(load_demonstrations(tmp_path / "one", ["turn on the stove"])["task"]) == {third}
    write_libero_hdf5(tmp_path / "two", [third, ninth], episodes=1)
    assert set(load_demonstrations(tmp_path / "two", [ninth])["task"]) == {ninth}
    with pytest.raises(DemonstrationError, match=rf"several tasks .*one of \['{third}', '{ninth}'\]"):
        load_demonstrations(tmp_path / "two", ["Turn on the stove"])


def test_a_suite_without_scenes_does_not_stand_for_a_scene(tmp_path: Path) -> None:
    write_libero_hdf5(tmp_path / "goal", [TASKS[0]], episodes=1)
    wanted = f"KITCHEN_SCENE3_{TASKS[0]}"
    with pytest.raises(DemonstrationError, match=rf"no demonstrations of '{wanted}'; .*\['{TASKS[0]}'\]"):
        load_demonstrations(tmp_path / "goal", [wanted])


def test_a_set_without_scenes_gives_a_task_the_name_it_was_asked_by() -> None:
    entries = [EpisodeEntry(TASKS[0], "Turn on the stove ", "", index, "a") for index in range(2)]
    wanted = f"KITCHEN_SCENE3_{TASKS[0]}"
    assert [entry.task for entry in select_entries(entries, [wanted], None, "set")] == [wanted] * 2


def test_one_task_may_be_a_string_and_episodes_are_counted_from_one(tmp_path: Path) -> None:
    write_libero_hdf5(tmp_path / "set")
    one = load_demonstrations(tmp_path / "set", "turn on the stove")
    assert one["task"] == load_demonstrations(tmp_path / "set", ["turn on the stove"])["task"]
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"episodes must be at least 1, got {count}; leave it out for all"):
            load_demonstrations(tmp_path / "set", episodes=count)
