"""`infovla bench data`: the set it makes is read by the readers, and what it reports. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infovla_peft.cli import main
from infovla_peft.data.demonstrations import load_demonstrations
from infovla_peft.speed.data import _stream
from infovla_peft.speed.demonstration_set import write_demonstration_set
from infovla_peft.speed.opening import resident_bytes
from infovla_peft.speed.reading import reader, tiny_model, training_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations")
    write_demonstration_set(folder, tasks=2, episodes=3, frames=5, image_size=16)
    return folder


def test_the_set_is_read_mapped_and_streamed_alike(folder: Path) -> None:
    frames = load_demonstrations(folder)
    assert len(frames) == 30
    assert frames["task"][::15] == ["task_000", "task_001"]
    assert len({np.asarray(image).tobytes() for image in frames["image"]}) == 30
    assert _stream(folder, frames, 12) > 0
    with pytest.raises(RuntimeError, match="frame 0 of the stream is not that of the mapped set"):
        _stream(folder, frames.select([1, 0]), 2)


def test_a_batch_is_the_models_and_a_step_takes_it(folder: Path) -> None:
    read, rows = reader(load_demonstrations(folder), tiny_model(32)[1])
    batch = read(np.array([0, 29, 7]))
    assert rows == 30
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    training_step(32)(batch)


def test_memory_of_files_does_not_count(tmp_path: Path) -> None:
    size = 2**25
    (tmp_path / "file").write_bytes(bytes(size))
    before = resident_bytes()
    mapped = np.memmap(tmp_path / "file", np.uint8, "r")
    assert mapped.max() == 0
    assert resident_bytes() - before < size / 2
    owned = np.ones(size, np.uint8)
    assert resident_bytes() - before > size / 2
    assert owned.all()


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.json"
    sizes = ["--image_size", "16", "--input_size", "32", "--batch_size", "4", "--repetitions", "1"]
    assert (
        main(
            [
                "bench",
                "data",
                "--json",
                str(file),
                *sizes,
                "--tasks",
                "1",
                "--episodes",
                "2",
                "--frames",
                "3",
                "--unprepared",
            ]
        )
        == 0
    )
    assert "samples_per_second_ratio_training" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert set(found["ratios"]) == {"resident_bytes_ratio_batch", "samples_per_second_ratio_training"}
    figures = found["figures"]
    assert (figures["tasks"], figures["episodes"], figures["frames"]) == (1, 2, 6)
    for name in ("open_seconds_first", "open_seconds", "open_seconds_unprepared"):
        assert figures[name]["median"] > 0
    assert figures["batch_bytes"]["median"] >= 4 * 3 * 32 * 32 * 4
