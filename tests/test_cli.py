"""The command line: help of every command, one clear error line, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import build_run

from infovla_peft import __version__
from infovla_peft.adapter_files import write_info
from infovla_peft.adapters import active_adapter
from infovla_peft.cli import explain, main, run_command
from infovla_peft.evaluation import TaskResult
from infovla_peft.hub import load_policy
from infovla_peft.library import find_adapters

COMMANDS = [
    "evaluate", "analyse", "demos", "report", "verify", "act", "push", "list", "cp", "docs", "bench", "doctor",
    "setup-libero",
]  # fmt: skip


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed on stderr: one line."""
    text = capsys.readouterr().err
    assert text.startswith("infovla: error: ")
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_its_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: infovla" in text
    assert not any(f"(default: {nothing})" in " ".join(text.split()) for nothing in (None, False))


def test_the_help_of_train_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--stream", "--lambda_rac", "--eval_episodes", "--learning_rate", "--output_dir"):
        assert option in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_a_misspelt_command_has_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["analyze", "runs/x"])
    assert ended.value.code == 2
    assert "invalid choice: 'analyze'; did you mean analyse?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["zzz"])
    assert "invalid choice: 'zzz' (choose from" in capsys.readouterr().err


def test_parsing_takes_no_simulator_and_no_torch() -> None:
    code = "import sys, infovla_peft.cli as c; c.make_parser(); print({'torch', 'robosuite'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "RECIPE.yaml"),
        (["train", "absent.yaml"], "no recipe at absent.yaml"),
        (["train", "--strem", "B1-1N1"], "did you mean stream"),
        (["train", "--stream", "B1"], "write Bi-kNm"),
        (["train", "--suite", "libero_gaol"], "libero_goal"),
        (["train", "--stream", "B0-1N1"], "must be trained on some"),
        (["report", "absent"], "absent"),
        (["act", "absent/adapter/folder", "--images", "x.png"], "there is no folder"),
    ],
)
def test_bad_input_gives_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in one_error(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "file"], "file/results.json does not exist: give the folder of a run"),
        (["docs", "file"], "file is, or lies below, a file; name another folder"),
        (["cp", "continual", "file/below"], "file/below is, or lies below, a file; name another folder"),
        (["demos", "file/below", "--dry-run"], "file is a file; name a folder for the demonstrations"),
        (["evaluate", "absent", "--image_size", "0"], "image_size must be at least 1"),
        (["evaluate", "absent", "--max_steps", "0"], "max_steps must be at least 1"),
        (["evaluate", "absent", "--open_loop_steps", "0"], "open_loop_steps must be at least 1"),
        (["evaluate", "absent", "--videos", "-1"], "videos must be at least 0"),
        (["evaluate", "absent", "--workers", "-3"], "workers must be at least 0"),
        (["demos", "new", "--image_size", "-1", "--dry-run"], "image_size must be at least 1"),
        (["demos", "new", "--noise", "-1", "--dry-run"], "noise must be at least 0"),
        (["demos", "new", "--noise", "nan", "--dry-run"], "noise must be at least 0, and finite"),
        (["demos", "new", "--workers", "-3", "--dry-run"], "workers must be at least 0"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_done(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    for more in ([], ["--dry-run"]) if arguments[0] == "evaluate" else ([],):
        assert main([*arguments, *more]) == 1
        assert message in one_error(capsys)
    assert os.listdir() == ["file"]


def test_errors_of_the_system_name_the_cure() -> None:
    assert "free some space" in explain(OSError(28, "No space left on device"))
    assert "free some space" in explain(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"))
    assert "free some space" in explain(ValueError("Error while serializing: I/O error: No space left on device"))
    assert "free some space" in explain(
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 3 vs 2")
    )
    assert "--output_dir" in explain(PermissionError(13, "Permission denied", "/data/run"))
    assert explain(KeyError("no statistics for 'x'")) == "no statistics for 'x'"


def test_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> int:
        def command() -> None:
            raise error

        return run_command(command)

    monkeypatch.delenv("INFOVLA_DEBUG", raising=False)
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 3) == 3
    assert fail(KeyboardInterrupt()) == 130
    capsys.readouterr()
    assert fail(AssertionError("never")) == 1
    assert "AssertionError: never" in one_error(capsys)
    monkeypatch.setenv("INFOVLA_DEBUG", "1")
    assert fail(ValueError("shown")) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.libero
def test_an_unknown_task_lists_near_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stream: B1-1N1\ntasks: [turn_on_the_stov, '1']\nuse_cpu: true\n")
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "run")]) == 1
    assert "'turn_on_the_stove'" in one_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.libero
def test_no_gl_library_is_named_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes
    import ctypes.util

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr(ctypes.util, "find_library", lambda _name: None)
    options = ["--stream", "B1-1N1", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    assert main(["train", *options]) == 1
    assert "setup-libero" in one_error(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.libero
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    options = ["--stream", "B1-1N1", "--use_cpu", "true", "--output_dir"]
    for folder, more in (("file", []), ("file/run", []), ("file", ["--dry-run"])):
        assert main(["train", *options, str(tmp_path / folder), *more]) == 1
        assert f"{folder} is, or lies below, a file; choose another --output_dir" in one_error(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_doctor_prints_every_check_and_its_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from infovla_peft.simulation import installation

    checks = [installation.Check("Python", True, "3.11"), installation.Check("OpenGL", False, "none", "apt-get ...")]
    monkeypatch.setattr(installation, "doctor", lambda: checks)
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "ok    Python: 3.11\nFAIL  OpenGL: none\n      cure: apt-get ...\n"


def test_act_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from infovla_peft.models.openvla import build_tiny_openvla

    model, processor = build_tiny_openvla(
        instructions=["open it"],
        image_size=24,
        vision_width=16,
        vision_depth=2,
        hidden_size=16,
        layers=1,
        heads=2,
        chunk=3,
    )
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    Image.linear_gradient("L").convert("RGB").resize((30, 30)).save(tmp_path / "view.png")
    arguments = ["act", str(tmp_path / "checkpoint"), "--images", str(tmp_path / "view.png")]
    state = ["--proprio", *["0.1"] * 8]
    assert main([*arguments, "--instruction", "open it", *state]) == 0
    actions = json.loads(capsys.readouterr().out)
    assert (len(actions), len(actions[0])) == (3, 7)
    for option, same in (("--center_crop", False), ("--no-center_crop", True), ("--dtype=bfloat16", False)):
        assert main([*arguments, "--instruction", "open it", *state, option]) == 0
        assert (json.loads(capsys.readouterr().out) == actions) == same
    assert main([*arguments, "--instruction", "open it", *state, "--dtype", "bf16"]) == 1
    assert "a valid `torch.dtype`" in one_error(capsys)
    assert main([*arguments, "--instruction", "open it", *state, "--revision", "v1"]) == 1
    assert "no revisions" in one_error(capsys)
    assert main([*arguments, *state]) == 1
    assert "say what to do: --instruction TEXT, or --task" in one_error(capsys)
    assert main([*arguments, "--instruction", "", *state]) == 1
    assert "must be a text that says what to do, got ''" in one_error(capsys)
    view = tmp_path / "view.png"
    for name, content in (("bad.png", b"no picture"), ("cut.png", view.read_bytes()[:60])):
        (tmp_path / name).write_bytes(content)
        assert main([*arguments[:-1], str(tmp_path / name), "--instruction", "open it", *state]) == 1
        error = one_error(capsys)
        assert f"{name} cannot be read as an image (" in error
        assert "give a PNG or JPEG file" in error
    Image.new("I;16", (30, 30), 40000).save(tmp_path / "deep.png")
    messages = {"deep.png": "holds no bytes; scale it", "absent.png": "there is no image file", ".": "no image file"}
    for name, message in messages.items():
        assert main([*arguments[:-1], str(tmp_path / name), "--instruction", "open it", *state]) == 1
        assert message in one_error(capsys)
    assert main([*arguments, "--instruction", "open it", *state, "--device", "meta:x"]) == 1
    assert "cannot be used here" in one_error(capsys)


@pytest.mark.libero
@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("single_task", [], {"8": "stage_02", "7": "stage_01", "4": "stage_02", "3": None}),
        ("single_task", ["--stage", "2"], dict.fromkeys("8743", "stage_02")),
        ("infovla", [], dict.fromkeys("8743", "stage_02")),
    ],
)
def test_a_run_of_single_tasks_is_evaluated_as_it_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: list[str], expected: dict[str, str | None]
) -> None:
    """Each task by the adapter that learned it; one that none has learned by the latest."""
    from infovla_peft.simulation import find_task

    run = build_run(tmp_path / "run")
    names = [find_task("libero_goal", number).name for number in (3, 7, 4)]
    for stage, adapter in enumerate(find_adapters(run), start=1):
        info = replace(adapter.info, task=names[stage], seen=names[: stage + 1], suite="libero_goal")
        write_info(adapter.folder, replace(info, training={"method": method, "assets": "primitive"}))
    used: dict[str, str | None] = {}

    def rollouts(policy: Any, tasks: Any, _pool: Any, **_options: Any) -> Any:
        for task in tasks:
            used[task.name] = active_adapter(policy.model)
            yield TaskResult(task.suite, task.name, [True], [1], 0.0, [])

    monkeypatch.setattr("infovla_peft.evaluation.evaluate", rollouts)
    monkeypatch.setattr("infovla_peft.simulation.workers.EnvironmentPool", lambda *_, **__: nullcontext())
    assert main(["evaluate", str(run), "--suite", "libero_goal", "--tasks", *expected, *options]) == 0
    assert used == {find_task("libero_goal", int(number)).name: name for number, name in expected.items()}


@pytest.mark.libero
@pytest.mark.parametrize("suite", ["libero_10", ""])
def test_an_adapter_without_a_recipe_is_evaluated_on_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suite: str
) -> None:
    """By the plan of `--dry-run` and by the rollouts alike, and what one refuses, the other does too."""
    from infovla_peft.simulation import find_task, suite_tasks

    run = build_run(tmp_path / "run")
    names = [find_task("libero_10", number).name for number in (3, 7, 4)]
    for stage, adapter in enumerate(find_adapters(run), start=1):
        info = replace(adapter.info, task=names[stage], seen=names[: stage + 1], suite=suite, training={})
        write_info(adapter.folder, info)
    rolled_out: list[str] = []

    def rollouts(_policy: Any, tasks: Any, _pool: Any, **_options: Any) -> Any:
        for task in tasks:
            rolled_out.append(task.name)
            yield TaskResult(task.suite, task.name, [True], [1], 0.0, [])

    monkeypatch.setattr("infovla_peft.evaluation.evaluate", rollouts)
    monkeypatch.setattr("infovla_peft.simulation.workers.EnvironmentPool", lambda *_, **__: nullcontext())
    alone = find_adapters(run)[0].folder
    everything = {name: [task.name for task in suite_tasks(name)] for name in ("libero_10", "libero_goal")}
    for policy, options, of, expected in (
        (run, [], "libero_10", names),
        (run, ["--stage", "1"], "libero_10", names[:2]),
        (run, ["--stage", "0"], "libero_10", names[:1]),
        (alone, [], "libero_10", names[:2]),
        (run, ["--suite", "libero_goal"], "libero_goal", everything["libero_goal"]),
        (run / "base", [], "libero_10", everything["libero_10"]),
    ):
        arguments = ["evaluate", str(policy), "--assets", "primitive", *options]
        rolled_out.clear()
        assert main(arguments) == 0
        assert f" on {of}: " in capsys.readouterr().out
        assert main([*arguments, "--dry-run"]) == 0
        planned = capsys.readouterr().out
        assert f" on {of}: {len(expected)} task" in planned
        assert planned.split()[-len(expected) :] == rolled_out == expected
    assert load_policy(run / "base").recipe == {}
    for policy, options in ((run / "base", []), (run, []), (run, ["--stage", "0"]), (alone, [])):
        errors = []
        for more in ([], ["--dry-run"]):
            assert main(["evaluate", str(policy), *options, "--unnorm_key", "nope", *more]) == 1
            errors.append(one_error(capsys))
        assert errors[0] == errors[1]
        assert "no statistics for 'nope'; set unnorm_key to one of: libero_10" in errors[0]
