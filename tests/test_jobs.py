"""Jobs in processes of their own: one that is lost is replaced, and the results are those of a quiet day."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lost_processes import Job, square

from infovla_peft.data import recording
from infovla_peft.data.recording import RecordingError
from infovla_peft.simulation import AssetSet, Task
from infovla_peft.simulation import jobs as jobs_module
from infovla_peft.simulation.jobs import LostJobError, work_off


def run(folder: Path, *how: str, workers: int = 2) -> list[int]:
    jobs: list[Job] = [(each, number, folder) for number, each in enumerate(how)]
    return sorted(work_off(square, jobs, workers=workers, patience=300, name=lambda job: f"job {job[1]}"))


def test_lost_processes_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []

    def patience(process: Any) -> float:
        """As if a process that has stopped itself had been silent for as long as it may."""
        if process.job[0].startswith("hang") and (tmp_path / "hung").exists() and not process._lost:
            return 0.0
        if process.job[0] == "slow":
            deadlines.append(process._deadline)
        return 0.05

    monkeypatch.setattr(jobs_module._Process, "patience", property(patience))
    assert run(tmp_path, "die1", "crash1", "hang1", "slow") == [0, 1, 4, 9]
    assert [len(list(tmp_path.glob(f"{number}.*"))) for number in range(4)] == [2, 2, 2, 1]
    assert len(set(deadlines)) >= 3  # each sign of life gives it its time anew


def test_a_job_that_costs_three_is_named(tmp_path: Path) -> None:
    with pytest.raises(LostJobError, match=r"job 0 died by SIGKILL \(exit code -9\), as 2 others before it"):
        run(tmp_path, "die9", workers=1)


def test_files_of_the_working_directory_are_no_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as to the process that starts them, whose path does not begin with it."""
    (tmp_path / "yaml.py").write_text("raise RuntimeError('this is a file of the user')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place])
    assert run(tmp_path, "fast", workers=1) == [0]


def test_an_error_is_given_as_it_is_and_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[subprocess.Popen[bytes]] = []
    launch = jobs_module.fresh_interpreter

    def noting(*arguments: object) -> subprocess.Popen[bytes]:
        launched.append(launch(*arguments))  # type: ignore[arg-type]
        return launched[-1]

    monkeypatch.setattr(jobs_module, "fresh_interpreter", noting)
    with pytest.raises(ZeroDivisionError, match="as asked"):
        run(tmp_path, "fail", "slow")
    assert [process.returncode is None for process in launched] == [False, False]


def test_an_error_that_cannot_be_sent_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="OddError: as asked 7"):
        run(tmp_path, "odd", workers=1)


def test_a_recording_that_loses_its_processes_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(_work: Any, jobs: Sequence[Any], **_options: Any) -> Iterator[Any]:
        yield from ()
        raise LostJobError(f"the process for {jobs[0]} died")

    monkeypatch.setattr(recording, "libero_folder", lambda: None)
    monkeypatch.setattr(recording, "choose_gl", lambda: None)
    monkeypatch.setattr(recording, "work_off", lose)
    task = Task("libero_goal", 7, "turn_on_the_stove", "turn on the stove", Path("none"))
    assets = AssetSet("primitive", tmp_path)
    with pytest.raises(RecordingError, match=r"demonstration 0 of .*turn_on_the_stove died.*same command again"):
        recording.record_demonstrations([task], tmp_path / "d", episodes=1, assets=assets, progress=False)
