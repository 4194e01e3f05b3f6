"""Every reader of the package, with a good example of what it reads."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fuzz_harness import Reader
from peft import LoraConfig, PeftModel, get_peft_model
from test_comparison import aggregate, run
from test_results import example
from torch import nn
from toy_demonstrations import TASKS, toy_demonstrations

from infovla_peft.adapter_files import INFO, WEIGHTS, AdapterError, AdapterInfo, read_info
from infovla_peft.adapters import read_adapter_weights, save_adapter
from infovla_peft.analysis_results import AffinityPair, Analysis, AnalysisError, ProbedTask, SimilarityPair
from infovla_peft.benchmark import BenchmarkError, load_benchmark
from infovla_peft.comparison import ComparisonError, load_comparison
from infovla_peft.config import RecipeError, load_recipe, parse_stream
from infovla_peft.data.normalisation import compute_statistics
from infovla_peft.evaluation import TaskResult
from infovla_peft.measurement import read_cell, write_cell
from infovla_peft.memory import Anchors, ReplayMemory
from infovla_peft.report import read_loss_curves
from infovla_peft.results import Results, ResultsError
from infovla_peft.run_folder import RunError, RunFolder

CONFIG = {
    "suite": "libero_goal",
    "stream": "B1-1N1",
    "seed": 0,
    "lambda_rac": 0.1,
    "tasks": ["0", "1"],
    "cameras": None,
}


def make_results(folder: Path) -> None:
    example().save(folder / "results.json")


def read_results(folder: Path) -> None:
    results = Results.load(folder / "results.json")
    results.save(folder / "again" / "results.json")
    assert Results.load(folder / "again" / "results.json") == results


def make_analysis(folder: Path) -> None:
    tasks = [ProbedTask("a", "do a", 0, 4, [2, 3]), ProbedTask("b", "do b", 1, 4, [2])]
    table: list[list[float | None]] = [[0.5, 0.25], [None, 1.0]]
    grids = [[[1.0, 0.5], [0.5, 2.0]], [[1.0, 1.0], [1.0, 1.0]]]
    Analysis(
        method="er", stream="B1-1N1", suite="libero_goal", seed=0, base_model="tiny", assets="primitive", frames=4,
        demonstrations=2, tap_layer=-1, temperature=0.1, stages=2, tasks=tasks, diffusion=table, cka=table,
        similarity=table, swap_change=table, listening=table, action_error=table,
        affinity=[AffinityPair("a", "analysis/a.png", [0, 1], [0.5, 0.75], grids)],
        matrices=[SimilarityPair("a", [0, 1], [[[1.0, 0.1]], [[0.5, -0.5]]])], versions={"python": "3.11"},
    ).save(folder)  # fmt: skip


def read_analysis(folder: Path) -> None:
    analysis = Analysis.load(folder)
    analysis.save(folder / "again")
    assert Analysis.load(folder / "again") == analysis


def make_aggregate(folder: Path) -> None:
    content = aggregate(run("er"), run("infovla", last=[0.9, 0.8, 0.9, 0.5]), run("er", seed=1))
    (folder / "aggregate.json").write_text(json.dumps(content))


def make_recipe(folder: Path) -> None:
    recipe = {"output_dir": "runs/x", "suite": "libero_goal", "stream": "B1-1N1", "tasks": ["0", "3"], "seed": 1,
              "lambda_rac": 0.2, "cameras": ["agentview"], "learning_rate": 1e-4, "teacher": "base", "bf16": False,
              "optim": "adamw_torch", "report_to": "none", "lr_scheduler_type": "cosine"}  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def read_recipe(folder: Path) -> None:
    load_recipe(folder / "recipe.yaml", ["--use_cpu=true", f"--output_dir={folder / 'run'}"])


def make_benchmark(folder: Path) -> None:
    content = {
        "output_dir": "runs/bench", "workers": 2, "recipe": {"stream": "B2-1N1", "stage_steps": 10},
        "suites": {"libero_goal": {"orders": {"A": [0, 1, 2], "B": [2, 1, 0]}}},
        "methods": {"weak": {"method": "infovla", "lambda_rac": 0}},
        "runs": [{"suite": "libero_goal", "methods": ["er", "weak"], "seeds": [0, 1], "orders": ["A"], "memory": [1]}],
    }  # fmt: skip
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(content))


def make_run(folder: Path) -> None:
    with RunFolder(folder).open(CONFIG) as opened:
        opened.mark("record", 12.5)
        opened.mark("base", 100.0, steps=20)


def read_run(folder: Path) -> None:
    with RunFolder(folder).open(CONFIG) as opened:
        for step in opened.state().values():
            float(step["seconds"])
        opened.mark("measure_base", 1.0)


def make_cell(folder: Path) -> None:
    cell = TaskResult("libero_goal", "open_it", [True, False, True], [80, 300, 91], 12.5, ["open_it_00.mp4"])
    (folder / "videos").mkdir()
    (folder / "videos" / "open_it_00.mp4").write_bytes(b"video")
    write_cell(folder / "open_it.json", cell, folder / "videos", 1)


def read_one_cell(folder: Path) -> None:
    cell = read_cell(folder / "open_it.json", 1)
    assert 0 <= sum(cell.successes) <= len(cell.successes) == len(cell.steps)


def make_log(folder: Path) -> None:
    log = folder / "stages" / "stage_01" / "log.jsonl"
    log.parent.mkdir(parents=True)
    lines = [{"stage": 1, "step": step, "loss": 1 / step, "loss_rac": 0.5, "lr": 1e-4} for step in range(1, 20)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_names(folder: Path) -> None:
    (folder / "names.txt").write_text("turn_on_the_stove")


def read_names(folder: Path) -> None:
    """Names that a recipe gives: of tasks (LIBERO's BDDL files), of suites and of streams."""
    from infovla_peft.simulation.suites import find_task

    text = (folder / "names.txt").read_bytes().decode("utf-8", errors="replace")
    for read in (lambda: parse_stream(text), lambda: find_task(text, 0)):
        with suppress(ValueError):
            read()
    assert text in (find_task("libero_goal", text).name, find_task("libero_goal", text).instruction) or int(text) < 10


def make_states(folder: Path) -> None:
    from infovla_peft.simulation.headless import libero_folder

    source = libero_folder() / "init_files" / "libero_goal" / "turn_on_the_stove.pruned_init"
    shutil.copy(source, folder / "turn_on_the_stove.pruned_init")


def read_states(folder: Path) -> None:
    from infovla_peft.simulation import start_states

    file = folder / "turn_on_the_stove.pruned_init"
    try:
        assert start_states.read_states(file).ndim == 2
    except ValueError as error:  # `initial_states` adds the name and the cure
        raise ValueError(f"cannot read the start states in {file} ({error}): reinstall hf-libero") from error


# --- adapters --------------------------------------------------------------------------------------------------------


@cache
def adapted() -> PeftModel:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]), adapter_name="task")


def statistics() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {"libero_goal": compute_statistics(random.uniform(-1, 1, (20, 7)), random.normal(size=(20, 8)), 2)}


def make_adapter(folder: Path) -> None:
    info = AdapterInfo(
        "../../base", {"config": "0" * 64, "weights": "1" * 64}, "libero_goal", task="open_it", instruction="open it",
        suite="libero_goal", stage=1, seen=["open_it"], cameras=["agentview"], training={"lora_r": 2},
    )  # fmt: skip
    save_adapter(adapted(), "task", folder / "adapter", info, statistics())


def read_adapter(folder: Path) -> None:
    read_info(folder / "adapter")
    read_adapter_weights(adapted(), "task", folder / "adapter")


# --- memory and demonstrations ---------------------------------------------------------------------------------------


def make_memory(folder: Path) -> None:
    torch.manual_seed(0)
    memory = ReplayMemory().add(toy_demonstrations(list(TASKS)[:1], episodes=1, frames=3, size=8))
    anchors = Anchors(
        action=torch.randn(2, 3, 3), affinity=torch.randn(2, 3, 4, 5), fused=torch.randn(2, 3, 6),
        output=torch.randn(2, 3, 4, 7), words=torch.tensor([1, 3, 5]), shifts=torch.zeros(2, 3, 2, dtype=torch.long),
        spec={next(iter(TASKS)): {"teacher": "base", "rows": "3"}},
    )  # fmt: skip
    memory.with_anchors(anchors).save(folder / "memory")


def read_memory(folder: Path) -> None:
    memory = ReplayMemory.load(folder / "memory")
    assert len(memory.tasks) <= len(memory)
    if memory.frames is not None:
        for row in memory.frames:
            assert np.isfinite(row["state"]).all()
    if memory.anchors is not None:
        memory.anchors.summary(torch.zeros(1, 2, dtype=torch.long), 5)
        for task in memory.anchors.spec:
            memory.anchors.of_task(task)


READERS = (
    Reader("results.json", make_results, read_results, ["results.json"], (ResultsError,)),
    Reader("analysis.json", make_analysis, read_analysis, ["analysis.json"], (AnalysisError,)),
    Reader(
        "aggregate of a benchmark", make_aggregate, lambda folder: load_comparison(folder / "aggregate.json"),
        ["aggregate.json"], (ComparisonError,),
    ),
    Reader("recipe (YAML)", make_recipe, read_recipe, ["recipe.yaml"], (RecipeError,)),
    Reader(
        "benchmark (YAML)", make_benchmark, lambda folder: load_benchmark(folder / "benchmark.yaml"),
        ["benchmark.yaml"], (BenchmarkError,),
    ),
    Reader("state.json, config.yaml", make_run, read_run, ["state.json", "config.yaml"], (RunError,)),
    Reader("rollouts of a task", make_cell, read_one_cell, ["open_it.json"], (RunError,)),
    Reader("log.jsonl", make_log, read_loss_curves, ["stages/*/log.jsonl"], ()),
    Reader("names of tasks, streams", make_names, read_names, ["names.txt"], (ValueError,), names_file=False),
    Reader("start states (BDDL tasks)", make_states, read_states, ["*.pruned_init"], (ValueError,)),
    Reader("infovla.json", make_adapter, read_adapter, [f"adapter/{INFO}"], (AdapterError,)),
    Reader("adapter (safetensors)", make_adapter, read_adapter, [f"adapter/{WEIGHTS}"], (AdapterError,)),
    Reader("memory", make_memory, read_memory, ["memory/**/*.*"], (ValueError,)),
)  # fmt: skip
