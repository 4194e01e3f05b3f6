"""Checksums: every kind of damage to every file that is read back is found, and the file is named."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import tiny_policy
from toy_demonstrations import TASKS, toy_demonstrations

from infovla_peft import files
from infovla_peft.adapter_files import AdapterError, AdapterInfo
from infovla_peft.adapters import add_adapter, fingerprint, load_adapter, save_adapter
from infovla_peft.checkpoints import checkpoints
from infovla_peft.config import InfoVLAConfig
from infovla_peft.files import atomic_file, atomic_folder, clean_up, remove_folder, scratch_folder
from infovla_peft.integrity import DamagedFileError, check_files, checksums, read_sealed, write_sealed
from infovla_peft.memory import Anchors, ReplayMemory
from infovla_peft.run_folder import RunFolder
from infovla_peft.tensor_files import load_tensors, save_tensors


def flip(file: Path) -> None:
    """One bit, anywhere."""
    content = bytearray(file.read_bytes())
    place = random.Random(len(content)).randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])  # a text's last line break is no loss


def tear(file: Path) -> None:
    """The second half never reached the disk."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES: list[Callable[[Path], None]] = [flip, cut, tear, empty]


def test_a_sealed_file_gives_back_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_text("a")
    sums = checksums([tmp_path / "data" / "a"], tmp_path)
    write_sealed(tmp_path / "x.json", {"format_version": 2, "pair": (1, 0.1), "text": "ä"}, sums)
    content = read_sealed(tmp_path / "x.json", newest=2)
    assert content == {"format_version": 2, "pair": [1, 0.1], "text": "ä", "sha256": sums}
    assert list(sums) == ["data/a"]
    check_files(tmp_path, sums)
    (tmp_path / "data" / "a").write_text("b")
    with pytest.raises(DamagedFileError, match=r"data/a is damaged"):
        check_files(tmp_path, sums)


def test_every_single_bit_of_a_sealed_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_sealed(file, {"format_version": 2, "successes": [True, False], "steps": 17}, {})
    whole = file.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(DamagedFileError, match=str(file)):
            read_sealed(file, newest=2)


def test_formats_before_and_after(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"steps": 1}')  # before there was a format
    assert read_sealed(file, newest=2) == {"steps": 1}
    for text, later in (
        ('{"format_version": 3}', True),
        ('{"format_version": "2"}', False),
        ('{"format_version": 0}', False),
    ):
        file.write_text(text)
        with pytest.raises(DamagedFileError, match=r"x\.json has format .*update the package") as raised:
            read_sealed(file, newest=2)
        assert raised.value.with_cure("delete it").endswith("update the package" if later else "; delete it")
    file.write_text('{"format_version": 2, "steps": 1}')
    with pytest.raises(DamagedFileError, match="lost its checksums"):
        read_sealed(file, newest=2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 4).to(torch.bfloat16), "b": torch.tensor(3), "c": torch.zeros(0, 2)}
    save_tensors(file, tensors, {"spec": "x"})
    read, notes = load_tensors(file)
    assert notes == {"spec": "x"}
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    damage(file)
    with pytest.raises(DamagedFileError, match=r"t\.safetensors is damaged"):
        load_tensors(file)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one base, `one` and `two`."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in ("one", "two"):
        policy = tiny_policy()
        config = InfoVLAConfig(output_dir=str(folder / "x"), lora_r=2, use_cpu=True, report_to="none")
        model = add_adapter(policy.model, name, config)
        info = AdapterInfo("../base", fingerprint(policy.model), "libero_goal", task=name, stage=len(name))
        save_adapter(model, name, folder / name, info, {"libero_goal": {"action": {"note": name}}})
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "dataset_statistics.json", "infovla.json"]
)
def test_a_damaged_adapter_is_never_used(
    adapters: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(adapters / "one", tmp_path / "one")
    damage(tmp_path / "one" / name)
    with pytest.raises(AdapterError, match=rf"{name}.* copy or train the adapter again"):
        load_adapter(tiny_policy().model, tmp_path / "one", "one")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "dataset_statistics.json"])
def test_a_file_of_another_adapter_is_never_used(adapters: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(adapters / "one", tmp_path / "one")
    shutil.copy(adapters / "two" / name, tmp_path / "one" / name)
    with pytest.raises(AdapterError, match=rf"{name} is damaged"):
        load_adapter(tiny_policy().model, tmp_path / "one", "one")


def test_an_adapter_without_checksums_still_loads(adapters: Path, tmp_path: Path) -> None:
    shutil.copytree(adapters / "one", tmp_path / "one")
    file = tmp_path / "one" / "infovla.json"
    content = json.loads(file.read_text())
    del content["sha256"]
    file.write_text(json.dumps({**content, "format_version": 1}))
    assert load_adapter(tiny_policy().model, tmp_path / "one", "one")[1].task == "one"
    file.write_text(json.dumps({**content, "format_version": 1, "sha256": {"../elsewhere": "0"}}))
    with pytest.raises(AdapterError, match="do not trust"):
        load_adapter(tiny_policy().model, tmp_path / "one", "one")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_is_never_used(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    task = next(iter(TASKS))
    memory = ReplayMemory().add(toy_demonstrations([task], frames=4)).save(tmp_path / "memory")
    tensors = {name: torch.randn(1, 4, 2) for name in ("action", "affinity", "fused", "output", "shifts")}
    memory.with_anchors(Anchors(**tensors, words=torch.ones(4), spec={task: {"rows": "4"}}))
    files = [file for file in (tmp_path / "memory").rglob("*") if file.is_file()]
    assert {"memory.json", "anchors.safetensors", "state.json"} < {file.name for file in files}
    for file in files:
        whole = file.read_bytes()
        damage(file)
        with pytest.raises(DamagedFileError, match=str(file)):
            ReplayMemory.load(tmp_path / "memory")
        file.write_bytes(whole)
    assert len(ReplayMemory.load(tmp_path / "memory")) == 4


# --- atomic writes ------------------------------------------------------------------------------------------------


def test_what_a_killed_writer_leaves_is_removed_or_put_back(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # killed between the two renames, with two more writes open
        rename = Path.rename

        def die(self: Path, target: Path) -> Path:
            if ".tmp" in self.name:
                os._exit(9)
            return rename(self, target)

        Path.rename = die  # type: ignore[method-assign, assignment]
        with atomic_file(tmp_path / "a.json"), atomic_folder(tmp_path / "deep" / "other"):
            (tmp_path / "memory").mkdir()
            (tmp_path / "memory" / "kept").write_text("1")
            with atomic_folder(tmp_path / "memory") as temporary:
                (temporary / "kept").write_text("2")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "memory").exists()
    with atomic_file(tmp_path / "mine.txt") as mine:
        (tmp_path / "stranger").mkdir()
        stranger = tmp_path / ".x.p4194304999-abc.tmp"  # of a process that lives, known here by no number
        (tmp_path / f".x.p{os.getppid()}-abc.tmp").touch()  # of one that died elsewhere; the number is another's here
        with stranger.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_SH)
            assert clean_up(tmp_path) == [tmp_path / "memory"]
        assert mine.exists()
    assert (tmp_path / "memory" / "kept").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        stranger.name, "deep", "memory", "mine.txt", "stranger"
    ]  # fmt: skip
    assert not list((tmp_path / "deep").iterdir())


def test_a_write_reaches_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        order.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with atomic_file(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("x")
    assert order == [tmp_path.name, temporary.name, "rename a.txt", "new"]


def test_a_folder_is_removed_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    for name in ("weights", "optimizer"):
        (checkpoint / name).write_text("1")

    def killed(folder: Path, **_options: Any) -> None:
        next(folder.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(checkpoint)
    assert checkpoints(tmp_path) == []  # no torn one, which would be taken for damage
    assert len(list(tmp_path.iterdir())) == 1
    assert clean_up(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_folders_of_a_run_are_entered_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Path] = []
    flush = files.fsync

    def note(path: Path) -> None:
        entered.append(Path(path))
        flush(path)

    monkeypatch.setattr(files, "fsync", note)
    with RunFolder(tmp_path / "runs" / "a").open({"seed": 0}):
        assert entered[:2] == [tmp_path / "runs", tmp_path]


def test_scratch_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with scratch_folder(tmp_path / "stages", "anchors") as scratch:
            (scratch / "action").write_text("1")
            os._exit(9)
    os.waitpid(child, 0)
    with scratch_folder(tmp_path / "stages", "vision") as mine:
        assert len(list((tmp_path / "stages").iterdir())) == 2
        clean_up(tmp_path)
        assert list((tmp_path / "stages").iterdir()) == [mine]
    assert list((tmp_path / "stages").iterdir()) == []
