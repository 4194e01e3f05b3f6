"""Recipes travel with the package and are handed out by `infovla cp`; options of commands come from YAML files."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import REPOSITORY
from tiny_run import build_run

from infovla_peft.adapter_files import write_info
from infovla_peft.cli import main, make_parser
from infovla_peft.command_options import apply_config, split_recipe
from infovla_peft.hub import load_policy
from infovla_peft.library import find_adapters
from infovla_peft.recipe_files import copy_recipe, list_recipes, recipes_folder
from infovla_peft.run_folder import RunFolder


def test_every_recipe_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes_folder() == REPOSITORY / "recipes"
    known = list_recipes()
    assert {"continual", "evaluate", "quickstart", "bench/bench_s", "accelerate/ddp"} <= set(known)
    assert not [path for path in known.values() if path.suffix == ".sh"]  # they set a checkout up
    for name, source in known.items():
        copied = copy_recipe(name, tmp_path / name.replace("/", "_").replace(".", "_"))
        assert copied.name == source.name
        assert copied.read_bytes() == source.read_bytes()
    assert main(["cp", "continual", str(tmp_path)]) == 0
    assert str(tmp_path / "continual.py") in capsys.readouterr().out
    assert (tmp_path / "continual.py").read_text() == (REPOSITORY / "recipes" / "continual.py").read_text()
    assert main(["cp", "quickstart.yaml", str(tmp_path)]) == 0
    assert (tmp_path / "quickstart.yaml").is_file()
    for strange in (".", "", "nothing"):
        assert main(["cp", strange]) == 1
        assert "there is no recipe" in capsys.readouterr().err
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
        ("episodes: 2.9", "episodes cannot be 2.9"),
        ("episodes: true", "episodes cannot be True"),
        ("noise: false", "noise cannot be False"),
        ("suite: yes", "suite cannot be True"),
        ("suite: 1.10", "suite is a text, not the number 1.1; write it in quotes"),
        ("suite: {a: b}", "suite cannot be {'a': 'b'}"),
        ("tasks: []", "tasks takes a list of at least one value"),
        ("tasks: [[7]]", "tasks cannot be [7]"),
        ("max-episodes: 3", "unknown option 'max-episodes'"),
        ("dry-run: true\ndry_run: true", "'dry_run' is given twice"),
        ("[", "not valid YAML"),
        ("a: &a [*a]", "contains itself"),
        ("seed: 0\nseed: 1", "the key 'seed' is given twice"),
        ("x: '" + "x" * (1 << 20) + "'", "larger than 1 MiB"),
        ("- a", "`option: value` lines"),
    ):
        options.write_text(text)
        assert main(["demos", str(tmp_path / "x"), "--config", str(options)]) == 1
        assert message in capsys.readouterr().err
    assert main(["demos", "--config", str(tmp_path / "absent.yaml")]) == 1
    assert "no file of options" in capsys.readouterr().err


def parsed(command: str, *arguments: object, text: str, folder: Path) -> argparse.Namespace:
    """The options of a command with a file of options."""
    (folder / "options.yaml").write_text(text)
    words = [*map(str, arguments), "--config", str(folder / "options.yaml")]
    parser = make_parser()
    apply_config(parser._subparsers._group_actions[0].choices[command], words)  # type: ignore
    return parser.parse_args([command, *words])


def test_no_value_in_a_file_keeps_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "episodes: null\noutput:\nvideos: 3\nimage_size: '64'\nopen-loop-steps: 4\ntasks: [7, '1']\nbase: null\n"
    options = parsed("evaluate", "x", text=f"{text}dry-run: true\ncenter_crop: false\n", folder=tmp_path)
    assert (options.episodes, options.videos, options.image_size, options.open_loop_steps) == (20, 3, 64, 4)
    assert (options.output, options.base, options.tasks, options.dry_run) == (None, None, ["7", "1"], True)
    assert options.center_crop is False
    assert parsed("demos", "x", text="noise: 1e-3\nseed: 2\n", folder=tmp_path).noise == 0.001
    assert parsed("demos", "x", text="dry_run: null\n", folder=tmp_path).dry_run is False
    for text, command in (("repo: null", "push"), ("run: null\nrepo: me/x", "push"), ("images: null", "act")):
        (tmp_path / "options.yaml").write_text(text)
        assert main([command, "--config", str(tmp_path / "options.yaml")]) == 1
        assert "has no value, and the command needs one" in capsys.readouterr().err


def test_options_have_either_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    def options(*words: str) -> argparse.Namespace:
        return make_parser().parse_args(list(words))

    one = options("evaluate", "x", "--max-steps", "4", "--open-loop-steps=2", "--dry_run", "--no_center_crop")
    two = options("evaluate", "x", "--max_steps", "4", "--open_loop_steps=2", "--dry-run", "--no-center_crop")
    assert one == two
    assert (one.max_steps, one.open_loop_steps, one.dry_run, one.center_crop) == (4, 2, True, False)
    assert options("demos", "x", "--assets-folder", "a_b-c").assets_folder == "a_b-c"
    state = options("act", "x", "--images", "a.png", "--proprio", "0", "-1e-3", "-.5", "-2E+01", "3").proprio
    assert state == [0.0, -1e-3, -0.5, -20.0, 3.0]
    pushed = options("push", "x", "--repo", "a/b", "--commit-message", "a-b_c", "--base-repo=a/c-d_e", "--dry_run")
    assert (pushed.commit_message, pushed.base_repo, pushed.dry_run) == ("a-b_c", "a/c-d_e", True)
    for words in (
        ["evaluate", "x", "--max-stepz", "4"],
        ["evaluate", "x", "--conf", "file.yaml"],
        ["evaluate", "x", "--dry__run"],
    ):
        with pytest.raises(SystemExit):
            options(*words)
    assert "unrecognized arguments: --dry__run" in capsys.readouterr().err


def test_a_token_can_be_given_to_every_command_that_asks_the_hub() -> None:
    for words in (["push", "x", "--repo", "a/b"], ["list", "a/b"], ["evaluate", "x"], ["act", "x", "--images", "a"]):
        assert make_parser().parse_args([*words, "--token", "hf_x"]).token == "hf_x"
        assert make_parser().parse_args(words).token is None


def test_the_recipe_of_train_may_be_named_as_config(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    for words in (
        ["--config", str(recipe), "--seed", "1"],
        ["--seed", "1", f"--config={recipe}"],
        [str(recipe), "--seed", "1"],
    ):
        assert split_recipe(words, "x") == (recipe, ["--seed", "1"])
    assert split_recipe(["--weight_decay", "-1e-4"], "x") == (None, ["--weight_decay", "-1e-4"])
    with pytest.raises(ValueError, match=r"two recipes, a\.yaml and --config b\.yaml"):
        split_recipe(["a.yaml", "--config", "b.yaml"], "x")


def test_a_benchmark_takes_its_options_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infovla_peft.speed import act
    from infovla_peft.speed.harness import Report

    given: list[argparse.Namespace] = []
    monkeypatch.setattr(act, "run", lambda options: given.append(options) or Report("act"))
    (tmp_path / "options.yaml").write_text("repetitions: 3\nshapes: [tiny]\nclock: cpu\n")
    assert main(["bench", "act", "--config", str(tmp_path / "options.yaml"), "--clock", "wall"]) == 0
    assert (given[0].repetitions, given[0].shapes, given[0].clock) == (3, ["tiny"], "wall")


@pytest.mark.libero
def test_a_dry_run_says_what_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from infovla_peft.simulation import find_task

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"stream: B1-1N1\nuse_cpu: true\nreport_to: none\noutput_dir: {tmp_path / 'run'}\n")
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert "B1-1N1 on libero_goal" in capsys.readouterr().out
    assert main(["train", "--dry-run", "--config", str(recipe)]) == 0
    assert "B1-1N1 on libero_goal" in capsys.readouterr().out
    push = ["--push_to_hub", "true", "--hub_model_id", "me/x", "--hub_revision", "v1", "--hub_private_repo", "true"]
    assert main(["train", str(recipe), "--dry-run", *push]) == 0
    assert "published     on the Hub after every stage: me/x, branch v1, private\n" in capsys.readouterr().out
    assert main(["train", str(recipe), "--dry-run", "--push_to_hub", "true"]) == 0
    assert "on the Hub after every stage: run\n" in capsys.readouterr().out
    assert main(["demos", str(recipe), "--tasks", "7", "--dry_run"]) == 1
    assert "is a file; name a folder" in capsys.readouterr().err
    assert main(["demos", str(tmp_path / "demos"), "--tasks", "7", "--episodes", "0", "--dry_run"]) == 1
    assert "at least 1" in capsys.readouterr().err
    assert main(["demos", str(tmp_path / "demos"), "--tasks", "7", "--episodes", "3", "--dry_run"]) == 0
    assert "turn_on_the_stove: 0 of 3 are there" in capsys.readouterr().out
    finished = build_run(tmp_path / "finished")
    assert (
        main(["evaluate", str(finished), "--suite", "libero_goal", "--tasks", "7", "--episodes", "4", "--dry-run"])
        == 0
    )
    assert "1 task x 4 rollouts" in capsys.readouterr().out
    assert main(["evaluate", str(finished), "--episodes", "4", "--dry-run", "--suite", "libero_goal"]) == 0
    assert "10 tasks x 4 rollouts" in capsys.readouterr().out  # it has learned none of this suite
    names = [find_task("libero_goal", number).name for number in (3, 7, 4)]
    for stage, adapter in enumerate(find_adapters(finished), start=1):
        info = replace(adapter.info, task=names[stage], seen=names[: stage + 1], training={"suite": "libero_goal"})
        write_info(adapter.folder, replace(info, tasks=[]))
    for options, learned in (((), names), (("--stage", "1"), names[:2]), (("--stage", "0"), names[:1])):
        assert main(["evaluate", str(finished), *options, "--dry-run"]) == 0
        assert capsys.readouterr().out.split()[-len(learned) :] == learned
        assert load_policy(finished).tasks_after(int(options[1]) if options else None) == learned
    with pytest.raises(ValueError, match=r"no adapter of stage 9; there are: stage 1, "):
        load_policy(finished).tasks_after(9)
    for adapter in find_adapters(finished):
        info = replace(adapter.info, training={"suite": "libero_goal", "method": "single_task"})
        write_info(adapter.folder, info)
    for options, learned in (((), names), (("--stage", "2"), names[2:]), (("--stage", "0"), names[:1])):
        assert main(["evaluate", str(finished), *options, "--dry-run"]) == 0
        assert capsys.readouterr().out.split()[1:][-len(learned) :] == learned
    for changes, message in (
        (["--report_to", "nonsense"], "'nonsense', which is not a tracker"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be at least 1"),
        (["--cameras", "front"], "cameras must be among"),
        (["--base_model", "./nowhere"], "base_model: there is nothing at ./nowhere"),
        (["--demonstrations_source", "/nowhere"], "demonstrations_source: there is nothing at /nowhere"),
    ):
        assert main(["train", str(recipe), "--dry-run", *changes]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "begun").mkdir()
    RunFolder(tmp_path / "begun").mark("demonstrations", 1.0)  # they were read, and may be gone
    begun = ["--demonstrations_source", "/nowhere", "--output_dir", str(tmp_path / "begun")]
    assert main(["train", str(recipe), "--dry-run", *begun]) == 0
    small = ["--per_device_train_batch_size", "2", "--stream", "B1-2N1"]
    for more, noted in (([], True), (["--memory_trajectories", "0", "--counterfactual_share", "0"], False)):
        assert main(["train", str(recipe), "--dry-run", *small, *more]) == 0
        assert ("note: in 1 process(es), a batch of 2 cannot hold 2" in capsys.readouterr().out) == noted
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path / "cache"))
    assert main(["train", str(recipe), "--dry-run", "--assets", "primitive"]) == 0
    assert not (tmp_path / "cache").exists()
    gpu = REPOSITORY / "recipes/configs/openvla_7b_qlora.yaml"  # planned where there is none
    assert main(["train", str(gpu), "--dry-run"]) == 0
    assert "B0-5N1 on libero_goal" in capsys.readouterr().out
    for wrong, message in (
        ([str(tmp_path / "absent")], "there is no folder"),
        ([str(tmp_path)], "holds no adapter"),
        ([str(finished), "--stage", "7"], "no adapter of stage 7"),
        ([str(finished), "--base", str(tmp_path / "absent")], "correct `base`"),
        ([str(finished / "base"), "--stage", "1"], "is a checkpoint without adapter"),
        ([str(finished), "--episodes", "51"], "episodes must be 1 to 50, got 51"),
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


def test_a_setup_that_failed_half_way_starts_anew(tmp_path: Path) -> None:
    """As on a Debian without python3-venv: `.venv/bin/python` is there, pip is not."""
    (tmp_path / "recipes").mkdir()
    shutil.copy(REPOSITORY / "recipes/setup.sh", tmp_path / "recipes")
    for file in ("pyproject.toml", "infovla_peft/simulation/installation.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    python = tmp_path / "python"

    def setup(*, whole: bool) -> subprocess.CompletedProcess[str]:
        works = 0 if whole else 1
        (tmp_path / "made").write_text(f'#!/bin/sh\necho "$*" >> made.log\nexit {works}\n')
        (tmp_path / "made").chmod(0o755)
        python.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p .venv/bin\ncp made .venv/bin/python\nexit {works}\n'
        )
        python.chmod(0o755)
        return subprocess.run(
            ["bash", "recipes/setup.sh", "video"],
            cwd=tmp_path, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    broken = setup(whole=False)
    assert broken.returncode == 1
    assert "apt-get install python3-venv" in broken.stderr
    again = setup(whole=True)
    assert again.returncode == 0, again.stderr
    assert "-m pip install" in (tmp_path / "made.log").read_text()
