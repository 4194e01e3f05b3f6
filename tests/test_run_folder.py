"""The run folder: configuration, finished steps, locking."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infovla_peft.run_folder import RunError, RunFolder
from infovla_peft.verify import verify_run

CONFIG = {"suite": "libero_goal", "seed": 0, "rate": 1e-4, "tasks": (1, 2), "workers": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run").open(CONFIG) as opened:
        yield opened


def test_the_same_configuration_continues_a_run(folder: RunFolder) -> None:
    folder.mark("base", 1.5, loss=0.25)
    folder.close()
    with RunFolder(folder.path).open(CONFIG) as again:
        assert again.done("base")
        assert again.state()["base"] == {"seconds": 1.5, "loss": 0.25}


def test_a_changed_configuration_is_refused_with_the_changed_keys(folder: RunFolder) -> None:
    folder.close()
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(RunError, match=r"(?s)seed: 0 -> 1.*--output_dir"):
        RunFolder(folder.path).open({**CONFIG, "seed": 1})
    assert (folder / "config.yaml").read_bytes() == before


def test_harmless_keys_may_change(folder: RunFolder) -> None:
    folder.close()
    RunFolder(folder.path).open({**CONFIG, "workers": 8}, harmless=["workers"]).close()


def test_two_processes_do_not_share_a_folder(folder: RunFolder) -> None:
    with pytest.raises(RunError, match=rf"another process is using .*: process {os.getpid()} on .*, started 20"):
        RunFolder(folder.path).open(CONFIG)
    with pytest.raises(RunError, match=rf"process {os.getpid()} "):  # a refused one leaves the owner's name
        RunFolder(folder.path).open(CONFIG)
    folder.close()
    RunFolder(folder.path).open(CONFIG).close()


def test_a_forked_child_does_not_hold_the_folder(folder: RunFolder) -> None:
    start, end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(end)
        os.read(start, 1)  # until the test ends
        os._exit(0)
    try:
        folder.close()
        RunFolder(folder.path).open(CONFIG).close()
    finally:
        os.close(end)
        os.waitpid(child, 0)


def test_a_changed_product_is_named(folder: RunFolder) -> None:
    product = folder / "base"
    (product / "deep").mkdir(parents=True)
    (product / "deep" / "weights").write_bytes(b"123")
    folder.once("base", lambda: None, products=[product], sealed=[product])
    folder.mark("later", 1.0)
    folder.check(product)
    (product / "deep" / "weights").write_bytes(b"124")
    with pytest.raises(RunError, match=r"base/deep/weights is damaged"):
        folder.check(product)
    folder.mark("base", 1.0, sealed=[product])
    folder.check(product)


@pytest.mark.parametrize("name", ["base", "memory", "report", "results.json"])
def test_a_folder_of_somebody_else_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine" / name).mkdir(parents=True)
    (tmp_path / "mine" / name / "precious.txt").touch()
    with pytest.raises(RunError, match=rf"holds no run, and files .* replace \({name}\); choose another"):
        RunFolder(tmp_path / "mine").open(CONFIG)
    assert (tmp_path / "mine" / name / "precious.txt").exists()
    assert not (tmp_path / "mine" / "config.yaml").exists()


def test_a_relative_product_says_from_where_it_was_looked_for(folder: RunFolder) -> None:
    folder.mark("demonstrations", 1.0)
    with pytest.raises(RunError, match=r"demos is missing \(seen from .*; a run's is relative to"):
        folder.require([Path("demos")], "demonstrations")


def test_a_finished_step_is_not_repeated(folder: RunFolder) -> None:
    calls: list[int] = []
    product = folder / "product"

    def work() -> None:
        calls.append(1)
        product.touch()

    folder.once("step", work, products=[product])
    folder.once("step", work, products=[product])
    assert len(calls) == 1
    product.unlink()
    with pytest.raises(RunError, match="is missing"):
        folder.once("step", work, products=[product])


def test_a_step_that_fails_is_not_finished(folder: RunFolder) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    folder.mark("earlier", 1.0)
    with pytest.raises(OSError, match="No space"):
        folder.once("step", fail)
    assert list(folder.state()) == ["earlier"]


def test_the_time_of_a_stopped_step_counts_when_it_is_finished(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 40.0, 100.0, 107.0, 200.0, 203.0])
    monkeypatch.setattr("infovla_peft.run_folder.time.monotonic", lambda: next(clock))

    def stop() -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            folder.once("learn", stop)
    assert folder.state() == {}
    folder.once("learn", lambda: {"note": 1})
    assert folder.state() == {"learn": {"seconds": 50.0, "note": 1}}
    assert "unfinished" not in json.loads((folder / "state.json").read_text(encoding="utf-8"))


def test_other_processes_wait_for_the_main_one(folder: RunFolder) -> None:
    other = RunFolder(folder.path, main_process=False).open({"ignored": True})
    waiting = threading.Thread(target=other.once, args=("step", lambda: pytest.fail("only rank 0 works")))
    waiting.start()
    folder.once("step", lambda: None)
    waiting.join(timeout=5)
    assert not waiting.is_alive()


def test_a_file_in_the_way_and_a_missing_permission_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="--output_dir"):
        RunFolder(tmp_path / "file" / "run").open(CONFIG)
    with pytest.raises(RunError, match=r"file is, or lies below, a file; choose another --output_dir"):
        RunFolder(tmp_path / "file").state()

    def refuse(*_args: object, **_options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # the tests may run as root, whom no permission stops
    with pytest.raises(RunError, match=r"cannot write to .*Permission denied.*--output_dir"):
        RunFolder(tmp_path / "run").open(CONFIG)


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": {}}', '{"format_version": 99, "steps": {}}'])
def test_a_damaged_state_is_refused(folder: RunFolder, content: str) -> None:
    (folder / "state.json").write_text(content)
    with pytest.raises(RunError, match=r"state\.json"):
        folder.state()


def test_the_state_is_strict_json(folder: RunFolder) -> None:
    folder.mark("step", 1.0)
    json.loads((folder / "state.json").read_text(), parse_constant=pytest.fail)


def test_a_run_that_lost_its_record_of_finished_steps_is_not_whole(folder: RunFolder) -> None:
    (folder / "adapters").mkdir()
    assert (folder / "state.json") in verify_run(folder.path).damage
    folder.mark("demonstrations", 1.0)
    assert (folder / "state.json") not in verify_run(folder.path).damage


def test_verify_names_a_file_that_holds_something_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").open(CONFIG)
    folder.close()
    folder.memory.mkdir()
    (folder.memory / "memory.json").write_text('{"a": 1}')  # the message about it says what it lacks
    found = verify_run(folder.path).damage
    assert "lacks" in found[folder.memory / "memory.json"]
    assert all(file.name in ("memory.json", "state.json") for file in found)
