"""Files of another stage are found out; what an error says to delete is made again by the same command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stream_fakes import STREAM, TRAINING, FakePool, install_fakes

from infovla_peft.checkpoints import check_checkpoint, publish_checkpoint
from infovla_peft.config import InfoVLAConfig, StreamConfig
from infovla_peft.consolidation import Consolidation
from infovla_peft.data.recorded import DemonstrationManifest, EpisodeRecord, RecordingSettings, TaskRecord
from infovla_peft.integrity import DamagedFileError
from infovla_peft.memory import ReplayMemory, memory_stage
from infovla_peft.mending import demonstrations_are_gone
from infovla_peft.run_folder import RunError
from infovla_peft.stream import Stream
from infovla_peft.verify import verify_run

pytestmark = pytest.mark.libero  # task names and instructions come from LIBERO's package
SETTINGS = RecordingSettings("primitive", "3.3.2", 24, ("agentview",), "fast", 0.1, 0)


@dataclass(frozen=True)
class Runs:
    """One run as it was after its first stage, and the same finished."""

    begun: Path
    finished: Path
    open: Callable[[Path], Stream]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")

    def open_run(run: Path) -> Stream:
        config = StreamConfig(**{**STREAM, "stream": "B1-2N1"})
        return Stream(config, InfoVLAConfig(**{**TRAINING, "output_dir": str(run), "save_steps": 3}))

    with pytest.MonkeyPatch.context() as patch:
        install_fakes(patch, folder)
        patch.setattr("infovla_peft.measurement.write_report_apart", lambda _: None)
        with open_run(folder / "finished") as stream:
            stream.record()
            DemonstrationManifest(SETTINGS).save(folder / "finished" / "demonstrations")
            stream.learn_base()
            for stage in stream.stages[:2]:
                if stage.index:
                    stream.learn(stage)
                stream.remember(stage)
                stream.measure(stage)
            shutil.copytree(folder / "finished", folder / "begun")
            stream.run()
        yield Runs(folder / "begun", folder / "finished", open_run)


def content(run: Path) -> dict[str, Any]:
    """Everything but times and what is drawn."""
    found: dict[str, Any] = {}
    for file in sorted(file for file in run.rglob("*") if file.suffix in (".json", ".safetensors", ".arrow")):
        if file.suffix == ".json":
            numbers = json.loads(file.read_text())
            if file.name not in ("state.json", "trainer_state.json"):
                drop = ("seconds", "sha256", "timings", "config", "training")
                found[str(file.relative_to(run))] = {key: v for key, v in numbers.items() if key not in drop}
        elif file.suffix == ".safetensors":  # whose notes are in no order
            tensors = load_file(file)
            found[str(file.relative_to(run))] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
        else:
            found[str(file.relative_to(run))] = file.read_bytes()
    return found


def copy(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target / "run", ignore=shutil.ignore_patterns(".lock")))


def finish(runs: Runs, run: Path) -> None:
    with runs.open(run) as stream:
        stream.run()
    assert verify_run(run).ok, verify_run(run).describe()
    expected, found = content(runs.finished), content(run)
    assert [name for name in {**expected, **found} if expected.get(name) != found.get(name)] == []


def test_another_file_is_no_configuration(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    (run / "config.yaml").write_bytes((run / "state.json").read_bytes())  # JSON is YAML, and this has no checksum line
    assert run / "config.yaml" in verify_run(run).damage


def test_a_configuration_that_lost_its_end_is_named(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    for kept in (len(lines) - 1, len(lines) - 20):
        (run / "config.yaml").write_text("".join(lines[:kept]))
        assert "the checksum" in verify_run(run).damage[run / "config.yaml"]


def test_exchanged_rollouts_are_found_and_measured_again(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    first, second = sorted(run.glob("stages/stage_0[01]/rollouts/*.json"), key=lambda file: (file.stem, str(file)))[:2]
    assert first.name == second.name  # the base's task, after two stages
    one, other = first.read_text(), second.read_text()
    first.write_text(other)
    second.write_text(one)
    assert {first, second} <= set(verify_run(run).damage)
    with pytest.raises(RunError, match=rf"{first} holds rollouts of .* after stage 1; delete it") as refused:
        finish(runs, run)
    assert "the run's command again" in str(refused.value)
    first.unlink()
    second.unlink()
    FakePool.calls.clear()
    finish(runs, run)
    assert FakePool.calls == [first.stem] * 2


def test_a_deleted_table_is_made_again_from_the_rollouts(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.finished, tmp_path)
    results = run / "results.json"
    results.write_text(results.read_text().replace('"libero_goal"', '"libero_goal "'))
    assert results in verify_run(run).damage
    results.unlink()
    FakePool.calls.clear()
    finish(runs, run)
    assert FakePool.calls == []


def test_the_memory_of_another_stage_is_refused_and_made_again(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    shutil.rmtree(run / "memory")
    shutil.copytree(runs.finished / "memory", run / "memory")
    assert memory_stage(run / "memory") == 2
    begun = verify_run(run)
    assert begun.ok  # as if a kill had come before it was entered ...
    with pytest.raises(RunError, match=r"is the memory of stage 2, not of stage 1; delete it") as refused:
        finish(runs, run)  # ... which cannot be, before the stage has learned
    assert str(run / "memory") in str(refused.value)
    shutil.rmtree(run / "memory")
    finish(runs, run)
    shutil.copytree(runs.begun / "memory", run / "memory", dirs_exist_ok=True)
    assert run / "memory" in verify_run(run).damage


def test_the_memory_of_another_run_is_refused_and_made_again(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    memory = ReplayMemory.load(run / "memory")
    assert memory.frames is not None
    other = memory.frames.map(lambda row: {"state": [value + 1.0 for value in row["state"]]})
    ReplayMemory(other).save(run / "memory", stage=1)
    assert "another run" in verify_run(run).damage[run / "memory"]
    with pytest.raises(RunError, match=r"is the memory of another run; delete it"):
        finish(runs, run)
    shutil.rmtree(run / "memory")
    finish(runs, run)
    assert verify_run(run).ok


def test_a_memory_that_was_moved_aside_is_no_damage(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy(runs.begun, tmp_path)
    rename, renamed = Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            ReplayMemory.load(run / "memory").save(run / "memory", stage=2)
    assert not (run / "memory").exists()
    found = verify_run(run)
    assert found.ok
    assert "moved it aside" in found.unchecked[run / "memory"]
    finish(runs, run)
    assert verify_run(run).ok


def test_what_else_lies_below_stages_is_nobodys_damage(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    (run / "stages" / "backup").mkdir()
    (run / "stages" / "stage_old").mkdir()
    assert verify_run(run).ok


def test_deleted_anchors_are_computed_again(runs: Runs, tmp_path: Path) -> None:
    run = copy(runs.begun, tmp_path)
    file = run / "memory" / "anchors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedFileError, match=rf"{file} is damaged; delete it"):
        finish(runs, run)
    file.unlink()
    finish(runs, run)


def test_recordings_that_were_deleted_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "demonstrations"
    assert demonstrations_are_gone(folder)
    folder.mkdir()
    (folder / "a.parquet").touch()
    task = TaskRecord("libero_goal", 0, "a", "do a", {0: EpisodeRecord(0, "a.parquet", 3, 1, 7)})
    DemonstrationManifest(SETTINGS, {"a": task}).save(folder)
    assert not demonstrations_are_gone(folder)
    (folder / "a.parquet").unlink()
    assert demonstrations_are_gone(folder)


def test_deleted_recordings_are_recorded_again_while_they_are_needed(runs: Runs, tmp_path: Path) -> None:
    for run, needed in ((copy(runs.begun, tmp_path / "a"), True), (copy(runs.finished, tmp_path / "b"), False)):
        shutil.rmtree(run / "demonstrations")
        with runs.open(run) as stream:
            if not needed:
                with pytest.raises(RunError, match="demonstrations is missing"):
                    stream.record()
                continue
            stream.record()
            assert (run / "demonstrations").exists()


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "weights").write_text("1")
    for stage in ("stage_01", "stage_02"):
        (tmp_path / stage).mkdir()
    publish_checkpoint(tmp_path / "staged", tmp_path / "stage_01" / "checkpoint-4")
    check_checkpoint(tmp_path / "stage_01" / "checkpoint-4")
    (tmp_path / "stage_01" / "checkpoint-4").rename(tmp_path / "stage_02" / "checkpoint-4")
    with pytest.raises(DamagedFileError, match=r"holds a checkpoint of another training \(stage_01\)"):
        check_checkpoint(tmp_path / "stage_02" / "checkpoint-4")
    (tmp_path / "stage_02").rename(tmp_path / "mine")  # a user's own folder may have any name
    check_checkpoint(tmp_path / "mine" / "checkpoint-4")


def test_the_fisher_information_of_another_stage_is_refused(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "stages" / "stage_01" / "fisher.safetensors"
    Consolidation({"a": torch.ones(2)}, {"a": torch.zeros(2)}).save(file, stage=1)
    Consolidation.load(file, stage=1)
    with pytest.raises(DamagedFileError, match=rf"{file} is of stage 1, not of stage 2"):
        Consolidation.load(file, stage=2)
    stream = runs.open(tmp_path)
    base, first, second = stream.stages
    assert stream._consolidated(base, file) is None
    with pytest.raises(RunError, match=r"is of stage 1, not of stage 2; restore it from a copy"):
        stream._consolidated(second, file)
    assert stream._consolidated(first, file) is not None
    file.unlink()
    with pytest.raises(RunError, match=r"is missing; restore it"):  # and not taken as if nothing came before
        stream._consolidated(first, file)
