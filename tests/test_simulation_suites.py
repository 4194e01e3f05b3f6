"""Suites, tasks, start states and asset sets: no simulator is loaded for any of them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from infovla_peft.simulation import STEP_CAPS, SUITES, AssetSet, assets, find_assets, find_task, suites
from infovla_peft.simulation.headless import load_libero, quiet
from infovla_peft.simulation.suites import initial_states, suite_tasks

FOLDERS = ("articulated_objects", "scenes", "stable_scanned_objects", "turbosquid_objects", "textures")


def test_import_takes_no_simulator_and_prints_nothing() -> None:
    code = """
import sys
import infovla_peft.simulation
assert not {"libero", "robosuite", "mujoco", "torch", "transformers"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_unknown_suite_names_a_near_one() -> None:
    with pytest.raises(ValueError, match="unknown suite 'libero_goals': did you mean 'libero_goal'"):
        suite_tasks("libero_goals")


@pytest.mark.libero
def test_tasks_are_those_of_the_benchmark() -> None:
    load_libero()
    with quiet():
        from libero.libero.benchmark import get_benchmark_dict

        for suite in SUITES:
            benchmark = get_benchmark_dict()[suite]()
            tasks = suite_tasks(suite)
            assert len(tasks) == (90 if suite == "libero_90" else 10)
            assert [(task.index, task.name, task.instruction) for task in tasks] == [
                (index, benchmark.get_task(index).name, benchmark.get_task(index).language)
                for index in range(benchmark.n_tasks)
            ]
            assert all(task.bddl_file.is_file() and task.max_steps == STEP_CAPS[suite] for task in tasks)
            np.testing.assert_array_equal(initial_states(tasks[3]), benchmark.get_task_init_states(3))


@pytest.mark.libero
def test_the_same_words_in_two_scenes_are_no_name() -> None:
    words = "close the top drawer of the cabinet"
    with pytest.raises(
        ValueError, match=r"several tasks .*KITCHEN_SCENE10_close_the_top.*KITCHEN_SCENE5_close_the_top"
    ):
        find_task("libero_90", words)
    assert find_task("libero_90", "KITCHEN_SCENE5_close_the_top_drawer_of_the_cabinet").instruction == words


def test_a_broken_download_of_assets_is_not_taken_for_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = iter([False, True])

    def download(*_arguments: object, local_dir: Path, **_options: object) -> None:
        for name in FOLDERS:
            (local_dir / name).mkdir(parents=True, exist_ok=True)
        if not next(whole):
            raise ConnectionError("reset by peer")

    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path))
    monkeypatch.delenv("INFOVLA_LIBERO_ASSETS", raising=False)
    monkeypatch.setattr(assets, "_known_official", lambda: iter([assets._downloads()]))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="reset by peer"):
        find_assets("official")
    assert find_assets("auto", fetch=False).name == "primitive"
    assert find_assets("official").name == find_assets("auto").name == "official"


@pytest.mark.libero
def test_every_task_has_fifty_start_states() -> None:
    for suite in SUITES:
        for task in suite_tasks(suite):
            states = initial_states(task)
            assert states.shape[0] == 50
            assert np.isfinite(states).all()


@pytest.mark.libero
def test_find_task_by_index_name_and_instruction() -> None:
    task = find_task("libero_goal", 7)
    assert task.name == "turn_on_the_stove"
    assert find_task("libero_goal", "turn_on_the_stove") == task
    assert find_task("libero_goal", "turn on the stove") == task
    assert find_task("libero_goal", "7") == task
    with pytest.raises(ValueError, match="no task 'turn_of_the_stove': did you mean 'turn_on_the_stove'"):
        find_task("libero_goal", "turn_of_the_stove")
    with pytest.raises(ValueError, match="has tasks 0 to 9, not 10"):
        find_task("libero_goal", 10)


@pytest.mark.libero
def test_nothing_but_arrays_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("executed",)

    task = find_task("libero_goal", 0)
    file = tmp_path / "init_files" / task.suite / f"{task.name}.pruned_init"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr(suites, "libero_folder", lambda: tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match=r"something else than one table of numbers.*reinstall hf-libero"):
        initial_states(task)
    assert "executed" not in capsys.readouterr().out
    file.write_bytes(b"truncated")
    with pytest.raises(ValueError, match="cannot read the start states"):
        initial_states(task)


def _official(folder: Path) -> Path:
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    return folder


def test_official_assets_are_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, exported, configured = (_official(tmp_path / name) for name in ("given", "exported", "configured"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(f"assets: {configured}\n")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "config"))
    monkeypatch.setenv("INFOVLA_LIBERO_ASSETS", str(exported))
    assert find_assets("official", given) == AssetSet("official", given)
    assert find_assets("auto") == AssetSet("official", exported)
    monkeypatch.delenv("INFOVLA_LIBERO_ASSETS")
    assert find_assets("auto") == AssetSet("official", configured)


def test_wrong_asset_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFOVLA_LIBERO_ASSETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"INFOVLA_LIBERO_ASSETS.*holds no LIBERO assets"):
        find_assets("auto")
    with pytest.raises(ValueError, match="assets must be one of"):
        find_assets("offical")


def test_missing_official_assets_name_the_cures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INFOVLA_LIBERO_ASSETS", raising=False)
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path))
    monkeypatch.setattr(assets, "_known_official", lambda: iter(()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"INFOVLA_LIBERO_ASSETS.*assets='primitive'"):
        find_assets("official")
    assert find_assets("auto").name == "primitive"
