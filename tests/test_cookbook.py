"""Every snippet of README.md and recipes/README.md is run: Python as it stands, of shell lines what is ours."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import REPOSITORY
from data_files import TASKS, write_lerobot, write_libero_hdf5
from stream_fakes import STREAM, TRAINING, FakePool, install_fakes
from tiny_run import build_run

from infovla_peft.cli import make_parser
from infovla_peft.command_options import split_recipe
from infovla_peft.config import InfoVLAConfig, StreamConfig, load_recipe
from infovla_peft.hub import load_policy
from infovla_peft.speed.command import make_parser as bench_parser

PAGES = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "recipes/README.md")}


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], flags=re.M | re.S)


def snippet(page: str, word: str) -> str:
    """The one Python snippet of a page that holds a word."""
    (found,) = [text for text in snippets(page, "python") if word in text]
    return found


def run(text: str, **names: Any) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "snippet", **names}
    exec(compile(text, "<snippet>", "exec"), space)
    return space


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the snippets name, in which they run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFOVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes"))
    return tmp_path


def test_every_snippet_is_known() -> None:
    """A new one needs a test here."""
    tested = {
        "README.md": ["LiberoEnvironment", "export_lerobot", "InfoVLAConfig, InfoVLATrainer", "policy.use"],
        "recipes/README.md": ["my_robot", "AnotherVLA", "METHODS", "class Nearness"],
    }
    for page, words in tested.items():
        assert len(snippets(page, "python")) == len(words)
        for word in words:
            snippet(page, word)
    assert len(snippets("recipes/README.md", "yaml")) == 1
    for page, text in PAGES.items():
        languages = set(re.findall(r"^```(\w+)$", text, flags=re.M))
        assert languages <= {"python", "bash", "yaml"}, page


@pytest.mark.libero
def test_readme_policy(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first snippet, on a tiny run; its simulation is faked, its policy is not."""
    import infovla_peft.simulation
    from infovla_peft.simulation import Observation
    from infovla_peft.stream import Stream

    install_fakes(monkeypatch, data)
    task = "put_the_bowl_on_top_of_the_cabinet"
    config = StreamConfig(**{**STREAM, "stream": "B1-1N1", "tasks": ["turn_on_the_stove", task]})
    options = {**TRAINING, "method": "er", "output_dir": "runs/quickstart"}
    with Stream(config, InfoVLAConfig(**options)) as stream:
        stream.run()
    asked: list[Any] = []

    class Environment:
        max_steps = 16

        def __init__(self, task: Any, **options: Any) -> None:
            asked.append((task.name, options["image_size"]))

        def __enter__(self) -> Environment:
            return self

        def __exit__(self, *_exception: object) -> None: ...

        def reset(self, **_options: int) -> None: ...

        def observe(self) -> Observation:
            return Observation({"agentview": np.zeros((112, 112, 3), np.uint8)}, np.zeros(8, np.float32))

        def step(self, action: Any) -> bool:
            asked.append(action.shape)
            return False

    monkeypatch.setattr(infovla_peft.simulation, "LiberoEnvironment", Environment)
    run(snippet("README.md", "LiberoEnvironment"))
    assert asked == [(task, 112), *[(7,)] * 16]
    assert FakePool.calls


def test_readme_data(data: Path) -> None:
    write_libero_hdf5(data / "LIBERO" / "datasets" / "libero_goal")
    write_lerobot(data / "HuggingFaceVLA" / "libero")
    write_lerobot(data / "runs" / "quickstart" / "demonstrations", episodes=5)
    space = run(snippet("README.md", "export_lerobot"))
    assert set(space["frames"]["task"]) == {"turn_on_the_stove"}
    assert next(iter(space["stream"]))["image"].size == (32, 32)
    assert (data / "libero_scripted" / "meta" / "info.json").is_file()


def test_readme_library() -> None:
    assert issubclass(run(snippet("README.md", "InfoVLAConfig, InfoVLATrainer"))["InfoVLATrainer"], object)


def test_readme_published_adapters(tmp_path: Path) -> None:
    """The published repository is a run here, and has other tasks."""
    folder = build_run(tmp_path / "run")
    learned = "close the door"
    text = snippet("README.md", "policy.use").replace("put the bowl on top of the cabinet", learned)
    names = {
        "load_policy": lambda _repository, **options: load_policy(folder, **options),
        "images": [np.full((24, 24, 3), shade, dtype=np.uint8) for shade in (0, 200)],
        "states": [np.zeros(8), np.full(8, 0.1)],
    }
    space = run(text, **names)
    policy = load_policy(folder, task=learned)
    alone = policy.act(names["images"][1], proprio=names["states"][1])
    np.testing.assert_allclose(space["actions"][1], alone, rtol=1e-5, atol=1e-5)


def test_own_data(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lerobot(data / "my_robot", cameras=("observation.images.top",))
    run(snippet("recipes/README.md", "my_robot"))
    assert "turn on the stove (32, 32) 8 7" in capsys.readouterr().out
    options = data / "recipe.yaml"
    (text,) = snippets("recipes/README.md", "yaml")
    options.write_text(f"{text}use_cpu: true\noutput_dir: run\n")
    config, training = load_recipe(options)
    if libero_is_here():
        from infovla_peft.stream import Stream

        stream = Stream(config, training)
        assert set(stream.demonstrations(stream.tasks)["task"]) == set(TASKS)


def libero_is_here() -> bool:
    from conftest import libero_installed

    return libero_installed()


def test_own_vla_and_own_loss(data: Path) -> None:
    write_libero_hdf5(data / "demonstrations")
    space = run(snippet("recipes/README.md", "AnotherVLA"))
    trainer = space["trainer"]
    logged = trainer.state.log_history
    assert logged[-1]["step"] == 3
    model = trainer.model
    changed = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert changed
    assert all(bool(parameter.abs().sum() > 0) for parameter in changed)
    assert {term.name for term in trainer.terms} == {"rac", "cmi", "output"}

    mine = run(snippet("recipes/README.md", "class Nearness"))["MyTrainer"]
    args = InfoVLAConfig(output_dir="runs/mine", max_steps=2, logging_steps=1, use_cpu=True, method="infovla_paper",
                         per_device_train_batch_size=8)  # fmt: skip
    args.cmi_mode = "relational"
    again = mine(model, args, trainer.train_dataset, trainer._collator, memory=space["memory"])
    again.train()
    assert all(entry["nearness"] >= 0 for entry in again.state.log_history if "nearness" in entry)
    assert any("nearness" in entry for entry in again.state.log_history)


def test_the_second_architecture_is_short() -> None:
    text = (REPOSITORY / "recipes" / "another_vla.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80


def test_own_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from infovla_peft.methods import METHODS
    from infovla_peft.terms import make_terms

    monkeypatch.setitem(METHODS, "my_method", METHODS["er"])  # so that it is taken out again
    space = run(snippet("recipes/README.md", "METHODS"))
    args = InfoVLAConfig(output_dir="unused", use_cpu=True)
    args.method = "my_method"  # type: ignore[assignment]
    assert space["METHODS"]["my_method"].has_teacher
    assert [term.name for term in make_terms(args)] == ["cmi", "output"]


@pytest.mark.parametrize("page", PAGES)
def test_shell_lines_parse(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of `infovla`, recipes and `accelerate launch` take the options they are given, within the text too.

    Files that are named exist.
    """
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes"))
    lines = [line for block in snippets(page, "bash") for line in block.splitlines()]
    lines += [f"infovla {command}" for command in re.findall(r"`infovla ([a-z]+ [^`|]*--[^`]*)`", PAGES[page])]
    seen = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        for word in words:
            if re.fullmatch(r"recipes/\S+\.(py|yaml|sh)", word):
                assert (REPOSITORY / word).exists(), line
        for command in line.split("&&"):
            try:
                seen += parses(shlex.split(command, comments=True))
            except (SystemExit, ValueError) as error:
                pytest.fail(f"{line}: {error}")
    assert seen


def parses(words: list[str]) -> bool:
    """Whether a command is one of ours; an error if it does not take these options."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        words = ["python", launched.training_script, *launched.training_script_args]
    match words:
        case ["infovla", "train", *options] | ["python", "recipes/continual.py", *options]:
            if options != ["--help"]:
                recipe, overrides = split_recipe(options, words[1])
                # bf16 needs a GPU that has it
                load_recipe(recipe, [*overrides, "--use_cpu", "true", "--bf16", "false"])
        case ["infovla", "bench", *options]:
            bench_parser(only=options[0]).parse_args(options)
        case ["infovla", *options]:
            make_parser().parse_args(options)
        case ["python", script, *options] if script.startswith("recipes/"):
            importlib.import_module(Path(script).stem).parse(options)
        case _:
            return False
    return True


@pytest.mark.parametrize(
    "line",
    [
        "infovla push runs/a --repos a/b",
        "infovla bench act --thread 1 --clock gpu",
        "infovla traing x.yaml",
        "accelerate launch --num_process_es 2 recipes/continual.py --seed 1",
        "accelerate launch recipes/continual.py recipes/configs/quickstart.yaml --metod er",
        "python recipes/evaluate.py x --taks 0",
    ],
)
def test_a_shell_line_that_does_not_parse_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(str(REPOSITORY / "recipes"))
    with pytest.raises((SystemExit, ValueError)):
        parses(shlex.split(line))


@pytest.mark.slow
def test_the_docstrings_are_rendered_by_one_command(tmp_path: Path) -> None:
    (line,) = [
        line for block in snippets("README.md", "bash") for line in block.splitlines() if "infovla docs" in line
    ]
    words = shlex.split(line)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "infovla_peft.cli", *words[1:]]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    page = (tmp_path / "site" / "infovla_peft" / "losses.html").read_text(encoding="utf-8")
    assert "replay_anchor_contrastive_loss" in page
    for module in (REPOSITORY / "infovla_peft").glob("[a-z]*.py"):
        assert (tmp_path / "site" / "infovla_peft" / f"{module.stem}.html").is_file()
