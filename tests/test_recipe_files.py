"""Recipes travel with the package and are handed out by `infovla cp`; options of commands come from YAML files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY
from tiny_run import build_run

from infovla_peft.cli import main
from infovla_peft.recipe_files import copy_recipe, list_recipes, recipes_folder


def test_every_recipe_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes_folder() == REPOSITORY / "recipes"
    known = list_recipes()
    assert {"continual", "evaluate", "quickstart", "quickstart.yaml", "bench/bench_s"} <= set(known)
    for name, source in known.items():
        copied = copy_recipe(name, tmp_path / name.replace("/", "_").replace(".", "_"))
        assert copied.name == source.name
        assert copied.read_bytes() == source.read_bytes()
    assert main(["cp", "continual", str(tmp_path)]) == 0
    assert str(tmp_path / "continual.py") in capsys.readouterr().out
    assert (tmp_path / "continual.py").read_text() == (REPOSITORY / "recipes" / "continual.py").read_text()
    assert main(["cp"]) == 0
    assert "libero_goal_b5_5n1" in capsys.readouterr().out


def test_a_copy_replaces_nothing_by_accident(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.py"
    target.write_text("mine")
    assert main(["cp", "continual", str(target)]) == 1
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["cp", "continual", str(target), "--force"]) == 0
    assert target.read_text() != "mine"
    assert main(["cp", "continaul"]) == 1
    assert "there is no recipe 'continaul'; there are another_vla, benchmark, continual" in capsys.readouterr().err


@pytest.mark.slow
def test_the_copy_runs(tmp_path: Path) -> None:
    copied = copy_recipe("continual", tmp_path)
    command = [sys.executable, str(copied), "--help"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--demonstrations_source" in done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_recipes(tmp_path: Path) -> None:
    """Needs a package index for the build back end."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(unpacked)], check=True)
    for path in (REPOSITORY / "recipes").rglob("*.yaml"):
        assert (unpacked / "infovla_peft" / "recipes" / path.relative_to(REPOSITORY / "recipes")).is_file()
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]; from infovla_peft.cli import main; main(['cp', 'continual', '.'])"
    )
    subprocess.run([sys.executable, "-c", code, str(unpacked)], check=True, cwd=tmp_path)
    assert (tmp_path / "continual.py").read_bytes() == (REPOSITORY / "recipes" / "continual.py").read_bytes()


def test_options_of_a_command_come_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tmp_path / "cp.yaml"
    options.write_text(f"name: continual\ntarget: {tmp_path / 'a.py'}\n")
    assert main(["cp", "--config", str(options)]) == 0
    assert main(["cp", "--config", str(options)]) == 1  # it is there now
    assert main(["cp", "evaluate", str(tmp_path / "b.py"), f"--config={options}"]) == 0  # the command line wins
    assert (tmp_path / "b.py").read_bytes() == (REPOSITORY / "recipes" / "evaluate.py").read_bytes()
    options.write_text(f"name: continual\ntarget: {tmp_path / 'a.py'}\nforce: true\n")
    assert main(["cp", "--config", str(options)]) == 0
    capsys.readouterr()
    for text, message in (
        ("episodse: 3", "unknown option 'episodse'; did you mean episodes"),
        ("episodes: many", "episodes cannot be 'many'"),
        ("tasks: 3", "tasks takes a list"),
        ("renderer: slow", "renderer must be one of fast, exact"),
        ("dry_run: 3", "dry_run is true or false"),
        ("[", "not valid YAML"),
        ("- a", "`option: value` lines"),
    ):
        options.write_text(text)
        assert main(["demos", str(tmp_path / "x"), "--config", str(options)]) == 1
        assert message in capsys.readouterr().err
    assert main(["demos", "--config", str(tmp_path / "absent.yaml")]) == 1
    assert "no file of options" in capsys.readouterr().err


@pytest.mark.libero
def test_a_dry_run_says_what_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"stream: B1-1N1\nuse_cpu: true\nreport_to: none\noutput_dir: {tmp_path / 'run'}\n")
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "B1-1N1 on libero_goal" in capsys.readouterr().out
    assert main(["train", "--dry-run", str(recipe)]) == 0
    assert "B1-1N1 on libero_goal" in capsys.readouterr().out
    assert main(["demos", str(tmp_path / "demos"), "--tasks", "7", "--episodes", "3", "--dry-run"]) == 0
    assert "turn_on_the_stove: 0 of 3 are there" in capsys.readouterr().out
    finished = build_run(tmp_path / "finished")
    assert (
        main(["evaluate", str(finished), "--suite", "libero_goal", "--tasks", "7", "--episodes", "4", "--dry-run"])
        == 0
    )
    assert "1 task x 4 rollouts" in capsys.readouterr().out
    for wrong, message in (
        ([str(tmp_path / "absent")], "there is no folder"),
        ([str(tmp_path)], "holds no adapter"),
        ([str(finished), "--stage", "7"], "no adapter of stage 7"),
        ([str(finished), "--base", str(tmp_path / "absent")], "correct `base`"),
        ([str(finished / "base"), "--stage", "1"], "is a checkpoint without adapter"),
    ):
        assert main(["evaluate", *wrong, "--dry-run"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "demos").exists()


def test_nothing_is_coloured_and_no_bar_is_drawn_into_a_log(tmp_path: Path) -> None:
    code = (
        "import sys; from infovla_peft.bars import progress_bar\n"
        "for _ in progress_bar(range(3), desc='x'): pass\n"
        "from infovla_peft.cli import main; sys.exit(main(['report', 'absent']))"
    )
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith("infovla: error: ")  # one line, and no bar before it
    assert "\x1b" not in done.stderr + done.stdout
