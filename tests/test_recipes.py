"""Recipes: every YAML parses and says how to launch it; the spelled-out loop does what the package's does."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file
from stream_fakes import STREAM, TRAINING, FakePool, install_fakes

from infovla_peft import load_policy
from infovla_peft.adapters import active_adapter, fingerprint, merge_adapters
from infovla_peft.config import InfoVLAConfig, StreamConfig, load_recipe
from infovla_peft.plan import plan_stages, worker_count
from infovla_peft.stream import Stream

RECIPES = REPOSITORY / "recipes"
CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_parses_and_opens_with_its_launch_line(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[:3]
    assert re.match(r"# (accelerate launch .*recipes/continual\.py|recipes/quickstart\.sh)", first[0])
    assert any(f"recipes/configs/{path.name}" in line for line in first)
    # bf16 needs a GPU that has it; everything else must hold on any machine.
    config, training = load_recipe(path, ["--use_cpu", "true", "--bf16", "false"])
    assert Path(str(training.output_dir)).parent == Path("runs")
    assert config.shape.total_tasks > 0


@pytest.mark.libero
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_names_tasks_that_exist(path: Path) -> None:
    config, _ = load_recipe(path, ["--use_cpu", "true", "--bf16", "false"])
    stages = plan_stages(config)
    assert sum(len(stage.tasks) for stage in stages) == config.shape.total_tasks


@pytest.mark.parametrize("name", ["continual", "evaluate", "merge_weight", "merge_base"])
def test_a_script_is_short_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len((RECIPES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 200
    module = script(name)
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"]) if name == "continual" else module.parse(["--help"])
    assert ended.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.libero
def test_the_spelled_out_loop_does_what_the_package_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_fakes(monkeypatch, tmp_path)
    options: dict[str, Any] = {**STREAM, **TRAINING, "stream": "B1-2N1"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in options.items() if key != "stream"))
    script("continual").main([str(recipe), "--stream", "B1-2N1", "--output_dir", str(tmp_path / "recipe")])
    text = capsys.readouterr().out
    assert "B1-2N1 on libero_goal" in text
    assert "final average" in text

    training = InfoVLAConfig(**TRAINING, output_dir=str(tmp_path / "package"))
    with Stream(StreamConfig(**{**STREAM, "stream": "B1-2N1"}), training) as stream:
        stream.run()
    adapters = sorted((tmp_path / "recipe" / "adapters").iterdir())
    assert len(adapters) == 2
    for adapter in adapters:
        ours = load_file(adapter / "adapter_model.safetensors")
        theirs = load_file(tmp_path / "package" / "adapters" / adapter.name / "adapter_model.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "recipe/success.csv").read_text() == (tmp_path / "package/success.csv").read_text()


@pytest.mark.libero
def test_the_spelled_out_loop_has_the_package_s_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int | None]] = []
    for name in ("record", "learn_base", "learn", "remember", "measure", "publish", "analyse"):

        def called(_: Stream, stage: Any = None, *_more: object, name: str = name) -> None:
            calls.append((name, stage and stage.index))

        monkeypatch.setattr(Stream, name, called)
    for name in ("plan", "summary"):
        monkeypatch.setattr(Stream, name, lambda _: "")
    monkeypatch.setattr(Stream, "__enter__", lambda stream: stream)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stream: B1-2N1\n")
    script("continual").main([str(recipe), "--use_cpu", "true", "--output_dir", str(tmp_path / "run")])
    spelled_out = list(calls)
    calls.clear()
    Stream(StreamConfig(stream="B1-2N1"), InfoVLAConfig(**TRAINING, output_dir=str(tmp_path / "run"))).run()
    assert spelled_out == calls
    assert calls[-3:] == [("measure", 2), ("analyse", None), ("publish", 2)]  # its figures go along


@pytest.mark.libero
def test_a_base_stage_from_a_checkpoint_is_what_the_next_stream_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bench-L: tasks together in one adapter, merged; then a stream with that as its base and its statistics."""
    install_fakes(monkeypatch, tmp_path)
    with Stream(
        StreamConfig(**{**STREAM, "stream": "B1-1N1"}),
        InfoVLAConfig(**TRAINING, output_dir=str(tmp_path / "checkpoint")),
    ) as stream:
        stream.run()
    checkpoint, merged = tmp_path / "checkpoint" / "base", tmp_path / "merged"
    together = {**STREAM, "stream": "B0-1N2", "base_model": str(checkpoint)}
    training = InfoVLAConfig(**TRAINING, method="sequential", output_dir=str(tmp_path / "base"))
    with Stream(StreamConfig(**together), training) as stream:
        stream.run()
    capsys.readouterr()
    module = script("merge_base")
    module.main(module.parse([str(tmp_path / "base"), str(merged)]))
    assert capsys.readouterr().out.split() == [str(merged)]
    learned, written = load_policy(tmp_path / "base"), load_policy(merged)
    assert written.normaliser.as_statistics() == learned.normaliser.as_statistics()
    assert fingerprint(written.model) != fingerprint(load_policy(checkpoint).model)
    following = {**STREAM, "stream": "B2-1N1", "base_model": str(merged)}
    with Stream(StreamConfig(**following), InfoVLAConfig(**TRAINING, output_dir=str(tmp_path / "stream"))) as stream:
        stream.run()
    after = load_policy(tmp_path / "stream")
    assert after.tasks == [*learned.tasks, after.tasks[-1]]
    assert after.normaliser.as_statistics() == learned.normaliser.as_statistics()


@pytest.mark.libero
def test_merge_weights_are_tried_on_validation_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_fakes(monkeypatch, tmp_path)
    for method in ("single_task", "er"):
        training = InfoVLAConfig(**TRAINING, method=method, output_dir=str(tmp_path / method))
        with Stream(StreamConfig(**{**STREAM, "stream": "B1-2N1"}), training) as stream:
            stream.run()
    module = script("merge_weight")
    merged: list[Any] = []

    def merge(model: Any, names: list[str], into: str, *, weight: float) -> None:
        merge_adapters(model, names, into, weight=weight)
        merged.append((names, weight, active_adapter(model)))

    monkeypatch.setattr(module, "merge_adapters", merge)
    FakePool.calls.clear()
    arguments = [
        "--weights",
        "0.5",
        "1",
        "--episodes",
        "2",
        "--workers",
        "1",
        "--output",
        str(tmp_path / "found.json"),
    ]
    module.main(module.parse([str(tmp_path / "single_task"), *arguments]))
    names = ["stage_01", "stage_02"]
    assert merged == [(names, 0.5, "merged"), (names, 1.0, "merged")]
    tasks = FakePool.calls[:3]
    assert len(set(tasks)) == 3
    assert FakePool.calls == tasks * 2
    assert {tuple(asked["states"]) for asked in FakePool.asked[-6:]} == {(30, 31)}
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["weight"], list(row["successes"])) for row in rows] == [(0.5, tasks), (1.0, tasks)]
    assert "w = 1.0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was tested from initial states 0 to 1, and a weight that is chosen on them"):
        module.main(module.parse([str(tmp_path / "single_task"), *arguments, "--first_state", "0"]))
    assert len(merged) == 2
    one = ["--weights", "0.5", "--episodes", "2", "--workers", "1", "--first_state", "0"]  # nothing is chosen
    module.main(module.parse([str(tmp_path / "single_task"), *one]))
    assert len(merged) == 3
    with pytest.raises(ValueError, match="is a run of er; its adapters build on each other"):
        module.main(module.parse([str(tmp_path / "er"), *arguments]))


def test_there_are_no_negative_workers() -> None:
    assert worker_count(0) >= 1
    assert worker_count(3) == 3
    with pytest.raises(ValueError, match=r"workers must be at least 0 \(one per core\), got -3"):
        worker_count(-3)
