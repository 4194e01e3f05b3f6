"""The queue of a benchmark: which runs there are, what they share, how they start, stop, fail, continue, add up.

No simulator and no training: a run is a small script that writes what a run leaves behind.
"""

from __future__ import annotations

import copy
import doctest
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY
from safetensors.torch import load_file
from stream_fakes import STREAM, TRAINING, FakePool, install_fakes
from test_recipes import script

from infovla_peft import benchmark as module
from infovla_peft import files
from infovla_peft.adapter_files import AdapterInfo, write_info
from infovla_peft.aggregation import aggregate, check_replacement, load_held
from infovla_peft.analysis_results import RANGES, Analysis, ProbedTask
from infovla_peft.benchmark import Benchmark, Job, learn_base, load_benchmark, progress, take_over_base
from infovla_peft.comparison import read_comparison
from infovla_peft.config import load_recipe
from infovla_peft.evaluation import TaskResult
from infovla_peft.files import write_json
from infovla_peft.measurement import read_cell
from infovla_peft.results import Results, TaskEntry
from infovla_peft.run_folder import RunError, RunFolder
from infovla_peft.run_queue import RunQueue, claim, describe_status, log_tail
from infovla_peft.stream import Stream

CONFIGS = sorted((REPOSITORY / "recipes" / "configs" / "bench").glob("*.yaml"))
LAUNCH = ["--use_cpu", "true", "--bf16", "false"]
CONFIG: dict[str, Any] = {
    "recipe": {"stream": "B2-2N1", "eval_episodes": 2, "learning_rate": "1e-3", "videos_per_task": 0},
    "suites": {"libero_goal": {"orders": {"A": [0, 1, 2, 3], "B": [0, 1, 3, 2], "C": [1, 0, 2, 3]}}},
    "methods": {"rac_only": {"method": "infovla", "lambda_cmi": 0}},
    "runs": [
        {"suite": "libero_goal", "methods": ["er", "rac_only"], "seeds": [0, 1], "orders": ["A", "B"]},
        {"suite": "libero_goal", "methods": ["er"], "seeds": [0], "orders": ["A"], "memory": [1, 0]},
    ],
}

# What a run leaves behind, without a run. In its folder, `crash`, `hang` and `early` decide how it ends, and `until`
# names the file that it waits for.
FAKE_RUN = """
import json, os, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
(folder / "started").write_text(str(os.getpid()))
with (folder.parent / "starts.txt").open("a") as file:
    file.write(f"{folder.name} {os.environ.get('OMP_NUM_THREADS')}\\n")
print("working", flush=True)
if (folder / "crash").exists():
    print("10 %\\r20 %", flush=True)
    print("it is broken", flush=True)
    sys.exit(3)
if (folder / "hang").exists():
    time.sleep(600)
if (folder / "until").exists():
    awaited, deadline = Path((folder / "until").read_text()), time.monotonic() + 10
    while not awaited.exists():
        if time.monotonic() > deadline:
            sys.exit(f"no {awaited}")
        time.sleep(0.02)
time.sleep(0.2)
if not (folder / "early").exists():
    for source in Path(sys.argv[2]).iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
"""


def write_config(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "bench.yaml"
    content = {"output_dir": str(tmp_path / "bench"), **CONFIG, **changes}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.fixture
def benchmark(tmp_path: Path) -> Benchmark:
    return load_benchmark(write_config(tmp_path))


def run_products(job: Job, folder: Path) -> None:
    """What a finished run leaves: state.json and results.json."""
    folder.mkdir(parents=True)
    stages = 1 if job.is_base else 3
    state = RunFolder(folder)
    for stage in range(stages):
        state.mark(f"learn_{stage:02d}", 30.0)
        state.mark(f"measure_{stage:02d}", 10.0)
    if not job.is_base:
        results_of(job).save(folder / "results.json")


def results_of(job: Job) -> Results:
    config, training = load_recipe(job.recipe, LAUNCH)
    results = Results(
        method=training.method,
        stream=config.stream,
        suite=config.suite,
        seed=training.seed,
        base_model=config.base_model,
        teacher="base",
        assets="official",
        renderer=config.renderer,
        step_cap=300,
        open_loop_steps=8,
        tasks=[TaskEntry(f"task_{name}", name, max(0, i - 1)) for i, name in enumerate(config.tasks or [])],
        versions={"python": "3.11.7"},
        commit="0123abc",
        config={**module.resolved_config(config, training), "assets": "official", "processes": 1},
    )
    names = [task.name for task in results.tasks]
    for stage in range(3):
        cells = dict.fromkeys(names[: 2 + stage], (1, 2))
        results.add_stage(stage, cells, timings={"train": 100.0, "evaluate": 50.0})
    return results


def fake_command(tmp_path: Path) -> Callable[[Job, Path], list[str]]:
    if not (tmp_path / "fake.py").exists():  # another queue's run may be reading it
        (tmp_path / "fake.py").write_text(FAKE_RUN, encoding="utf-8")

    def command(job: Job, recipe: Path) -> list[str]:
        assert yaml.safe_load(recipe.read_text(encoding="utf-8")) == job.recipe
        products = tmp_path / "products" / job.name.replace("/", "_")
        if not products.exists():
            run_products(job, products)
        return [sys.executable, str(tmp_path / "fake.py"), str(job.folder), str(products)]

    return command


def queue(benchmark: Benchmark, tmp_path: Path, lines: list[str] | None = None, **options: Any) -> RunQueue:
    say = (lines if lines is not None else []).append
    return RunQueue(benchmark.jobs, fake_command(tmp_path), **{"workers": 2, "say": say, "poll": 0.02, **options})


def starts(benchmark: Benchmark) -> list[str]:
    file = benchmark.output_dir / "libero_goal" / "starts.txt"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def names(benchmark: Benchmark) -> list[str]:
    return [job.folder.name for job in benchmark.jobs if job.key]


# --- the matrix --------------------------------------------------------------------------------------------------


@pytest.mark.libero
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_benchmark_and_every_recipe_in_it_parses(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# python recipes/benchmark.py run recipes/configs/bench/{path.name}"
    benchmark = load_benchmark(path)
    assert benchmark.output_dir == Path("runs") / path.stem
    benchmark.check()
    for job in benchmark.jobs:
        config, training = load_recipe(job.recipe, LAUNCH)
        assert config.shape.total_tasks == len(config.tasks or [])
        assert training.output_dir == str(job.folder)


@pytest.mark.libero
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_benchmark_names_tasks_that_exist(path: Path) -> None:
    from infovla_peft.simulation import find_task

    benchmark = load_benchmark(path)
    for suite, orders in benchmark.orders.items():
        for tasks in orders.values():
            assert len({find_task(benchmark.common[suite]["suite"], task).name for task in tasks}) == len(tasks)


def test_bench_s_is_what_it_says() -> None:
    jobs = load_benchmark(REPOSITORY / "recipes/configs/bench/bench_s.yaml").jobs
    keys = [job.key for job in jobs if job.key]
    assert [job.is_base for job in jobs].count(True) == 4
    assert jobs[0].is_base
    for method in ("er", "infovla"):
        found = {(key.seed, key.order) for key in keys if key[:2] == ("libero_goal", method) and key.memory == 1}
        assert found == {(seed, order) for seed in range(4) for order in "AB"} | {(seed, "A") for seed in range(4, 8)}
        assert {key.memory for key in keys if key.method == method} == {0, 1, 5}
    for method in (
        "der++",
        "mir",
        "multitask",
        "infovla_paper",
        "infovla_paper_rac_only",
        "infovla_paper_cmi_only",
        "infovla_rac_only",
        "infovla_cmi_only",
        "infovla_output_only",
    ):
        assert {key.seed for key in keys if key.method == method} == {0, 1, 2}
    assert len(keys) == len(set(keys)) == 12 + 12 + 27 + 10 + 8 + 6 + 4 + 6 + 11 + 3 + 9 + 1


def test_bench_l_has_the_paper_s_weights_beside_the_default() -> None:
    jobs = load_benchmark(REPOSITORY / "recipes/configs/bench/bench_l.yaml").jobs
    weights = {}
    for job in jobs:
        if job.key and (job.key.suite, job.key.seed) == ("libero_goal_oft", 0):
            recipe = module.resolved_recipe(job.recipe)
            weights[job.key.method] = (recipe["method"], recipe["lambda_rac"], recipe["lambda_cmi"])
    del weights["er"]
    assert weights == {
        "infovla": ("infovla", 0.02, 0.02),
        "infovla_paper": ("infovla_paper", 0.1, 0.1),
        "infovla_01": ("infovla", 0.1, 0.1),
    }
    assert sum(job.key is not None for job in jobs) == 48


def test_runs_are_ordered_named_and_not_doubled(benchmark: Benchmark) -> None:
    assert names(benchmark) == [
        "er_A_m1_s0", "rac_only_A_m1_s0", "er_B_m1_s0", "rac_only_B_m1_s0",
        "er_A_m1_s1", "rac_only_A_m1_s1", "er_B_m1_s1", "rac_only_B_m1_s1",
        "er_A_m0_s0",
    ]  # fmt: skip
    assert [job.is_base for job in benchmark.jobs] == [True] + [False] * 9
    first = benchmark.jobs[2]
    assert first.recipe["method"] == "infovla"
    assert first.recipe["lambda_cmi"] == 0
    assert first.recipe["tasks"] == ["0", "1", "2", "3"]
    assert first.recipe["eval_workers"] == 1
    assert first.base == benchmark.jobs[0]
    assert first.recipe["base_model"] == str(benchmark.jobs[0].folder / "base")
    assert first.recipe["demonstrations_folder"] == benchmark.jobs[0].recipe["demonstrations_folder"]


def test_a_base_is_shared_by_what_it_is(tmp_path: Path) -> None:
    def bases(**changes: Any) -> list[str]:
        return [job.name for job in load_benchmark(write_config(tmp_path, **changes)).jobs if job.is_base]

    (base,) = bases()
    run = CONFIG["runs"][0]
    # Another order of the base tasks, or another option that it depends on, is another base.
    assert len(bases(runs=[{**run, "orders": ["A", "B", "C"]}])) == 2
    assert bases(recipe={**CONFIG["recipe"], "base_steps": 7}) != [base]
    assert bases(recipe={**CONFIG["recipe"], "warmup_steps": 7}) != [base]
    assert bases(recipe={**CONFIG["recipe"], "learning_rate": 2e-3, "lora_r": 4, "save_steps": 7}) == [base]
    assert bases(runs=[{**run, "orders": ["B"]}]) == [base]
    # A tiny base's tokeniser knows the words of the later tasks.
    orders = {"A": [0, 1, 2, 4], "B": [0, 1, 2, 3]}
    assert len(bases(suites={"libero_goal": {"orders": orders}})) == 2


def test_a_run_may_start_from_a_base_of_another_seed(tmp_path: Path) -> None:
    run = {**CONFIG["runs"][0], "orders": ["A"]}
    runs = [run, {**run, "seeds": [2], "base_seed": 1}]
    first, second = [job for job in load_benchmark(write_config(tmp_path, runs=runs)).jobs if job.is_base]
    assert (first.recipe["seed"], second.recipe["seed"]) == (0, 1)
    differing = {name for name in first.recipe if first.recipe[name] != second.recipe[name]}
    assert differing == {"seed", "output_dir"}
    benchmark = load_benchmark(write_config(tmp_path, runs=runs))
    seeds = {job.key.seed: job.base_seed for job in benchmark.jobs if job.key}
    assert seeds == {0: 0, 1: 0, 2: 1}
    assert {job.recipe["base_model"] for job in benchmark.jobs if job.key and job.key.seed == 2} == {
        str(second.folder / "base")
    }
    finish(benchmark.jobs[-1])
    content, _ = aggregate(benchmark)
    assert [(run.seed, run.base_seed) for run in read_comparison(content).runs] == [(2, 1)]


def test_a_checkpoint_stays_the_base(tmp_path: Path) -> None:
    recipe = {**CONFIG["recipe"], "base_model": "openvla/openvla-7b"}
    benchmark = load_benchmark(write_config(tmp_path, recipe=recipe))
    assert {job.recipe["base_model"] for job in benchmark.jobs} == {"openvla/openvla-7b"}


def test_methods_are_selected_with_their_bases(benchmark: Benchmark) -> None:
    assert [job.folder.name.split("_")[0] for job in benchmark.select(["rac_only"])] == ["base"] + ["rac"] * 4
    with pytest.raises(ValueError, match="no run of ewc; there are er, rac_only"):
        benchmark.select(["rac_only", "ewc"])


def test_runs_are_selected_by_name(benchmark: Benchmark) -> None:
    runs = [job.name for job in benchmark.jobs if not job.is_base]
    assert [job.name for job in benchmark.select([runs[1]]) if not job.is_base] == [runs[1]]
    assert [job.is_base for job in benchmark.select([runs[1]])] == [True, False]
    assert benchmark.select(["libero_goal/*"]) == list(benchmark.jobs)
    both = benchmark.select(["er", "libero_goal/rac_only_*"])
    assert both == list(benchmark.jobs)
    with pytest.raises(ValueError, match=r"no run of libero_object/\*"):
        benchmark.select(["er", "libero_object/*"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suits": {}}, "unknown key 'suits'; did you mean suites"),
        ({"output_dir": None}, "output_dir must name a folder"),
        ({"runs": []}, "runs must be a list of at least one"),
        ({"runs": [{"suite": "libero_goal", "methods": ["er"], "seeds": [0], "order": ["A"]}]}, "did you mean orders"),
        ({"runs": [{"suite": "libero_gaol", "methods": ["er"], "seeds": [0]}]}, "must be one of libero_goal"),
        ({"runs": [{"suite": "libero_goal", "methods": ["er"], "seeds": ["x"]}]}, "seeds must be an integer"),
        ({"runs": [{"suite": "libero_goal", "methods": ["er"], "seeds": [0], "orders": ["Z"]}]}, "has no order Z"),
        ({"recipe": {"stream": "B2-2N1", "seed": 3}}, "seed follow from `runs`"),
        ({"runs": [{**CONFIG["runs"][0], "base_seed": -1}]}, r"runs\[0\].base_seed must be an integer of at least 0"),
        ({"runs": [CONFIG["runs"][0], {**CONFIG["runs"][0], "base_seed": 1}]}, "er_A_m1_s0 is there with 0; choose"),
        (
            {"runs": [{**CONFIG["runs"][0], "base_seed": 1}], "recipe": {"stream": "B2-2N1", "base_model": "some/7b"}},
            "a seed is for base_model tiny",
        ),
        ({"recipe": {}}, "say `stream`"),
        ({"methods": {"er": {"eval_episodes": 50}}}, "eval_episodes must be the same for all methods"),
        ({"workers": 0}, "workers must be an integer of at least 1"),
        ({"suites": {"libero_goal": {"orders": {}}}}, "has no order A"),
        (
            {"recipe": {**CONFIG["recipe"], "stage_stepz": 6}},
            "bench.yaml: recipe: unknown option 'stage_stepz'; did you mean stage_steps.*`python recipes/continual"
            ".py --help` lists all",
        ),
        (
            {"suites": {"libero_goal": {**CONFIG["suites"]["libero_goal"], "camera": 1}}},
            "suites.libero_goal: unknown opt",
        ),
        (
            {"methods": {"rac_only": {"method": "infovla", "lambda_rak": 1}}},
            r"methods.rac_only: unknown option 'lambda_rak'; did you mean lambda_rac.*\? `python recipes/cont",
        ),
        (
            {"methods": {"rac_only": {"method": "infovla", "zzz": 1}}},
            "option 'zzz'; `python recipes/continual.py --help`",
        ),
        (
            {"recipe": {**CONFIG["recipe"], "stage_steps": "six"}},
            "bench.yaml: the options of libero_goal/er: argument --stage_steps.*'six'; `python recipes/continual.py "
            "--help` says what",
        ),
        (
            {"methods": {"rac_only": {"method": "infovla", "lambda_cmi": -1}}},
            "the options of libero_goal/rac_only: lambda_cmi must be at least 0",
        ),
        (
            {"methods": {"rac_only": {"method": "inforla"}}},
            r"methods.rac_only: there is no method 'inforla' \(did you mean infovla\?\); there are sequential, er",
        ),
        (
            {"methods": {"rac_only": {"lambda_cmi": 0}}},
            "'rac_only'.*, and `method:` does not say which one this row is",
        ),
        (
            {"runs": [{**CONFIG["runs"][0], "methods": ["er", "inforla"]}]},
            r"runs\[0\].methods: there is no method 'inforla' \(did you mean infovla\?\); there are rac_only, sequ",
        ),
        (
            {"runs": [{**CONFIG["runs"][0], "methods": ["er", "rac_onli"]}]},
            r"runs\[0\].methods: there is no method 'rac_onli' \(did you mean rac_only\?\)",
        ),
    ],
)
def test_an_unusable_benchmark_is_explained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_benchmark(write_config(tmp_path, **changes))


def test_wrong_options_are_found_before_the_first_run(tmp_path: Path) -> None:
    path = write_config(tmp_path, recipe={**CONFIG["recipe"], "lora_rr": 4})
    with pytest.raises(ValueError, match=r"bench.yaml: recipe: unknown option 'lora_rr'; did you mean lora_r"):
        load_benchmark(path)


def test_where_there_is_no_benchmark_those_that_there_are_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, place in ((REPOSITORY, "recipes/configs/bench"), (tmp_path, f"{REPOSITORY}/recipes/configs/bench")):
        monkeypatch.chdir(folder)
        with pytest.raises(
            FileNotFoundError, match=rf"no benchmark at none.yaml; in {place} are bench_l, bench_s, .*ns"
        ):
            load_benchmark("none.yaml")
        with pytest.raises(FileNotFoundError, match=f"did you mean {place}/bench_s_terms.yaml\\?"):
            load_benchmark("bench_s_term.yaml")

    def without_recipes() -> Path:
        raise FileNotFoundError("no recipes")

    monkeypatch.setattr(module, "recipes_folder", without_recipes)
    with pytest.raises(FileNotFoundError, match=r"no benchmark at none.yaml$"):
        load_benchmark("none.yaml")


@pytest.mark.libero
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "infovla", "counterfactual_frames": 1}, r"libero_goal/row_A_m1_s0: counterfactual_frames must be"),
        ({"report_to": "no_such_tracker"}, r"row_A_m1_s0: report_to names 'no_such_tracker'"),
        ({"method": "multitask", "analyse": True}, r"row_A_m1_s0: .* trains on all; .*below this method's name in"),
    ],
)
def test_what_a_run_would_stumble_over_is_found_before_its_base_is_trained(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    runs = [{"suite": "libero_goal", "methods": ["er", "row"], "seeds": [0], "orders": ["A"]}]
    found = load_benchmark(write_config(tmp_path, runs=runs, methods={"row": {"method": "er", **options}}))
    assert not found.jobs[0].folder.exists()
    found.check(found.jobs[:2])
    with pytest.raises(ValueError, match=message):
        found.check()


@pytest.mark.libero
def test_a_method_that_cannot_be_analysed_may_leave_it_out(tmp_path: Path) -> None:
    runs = [{"suite": "libero_goal", "methods": ["er", "multitask"], "seeds": [0], "orders": ["A"]}]
    recipe = {**CONFIG["recipe"], "analyse": True}
    base, er, _ = load_benchmark(write_config(tmp_path, runs=runs, recipe=recipe)).jobs
    found = load_benchmark(write_config(tmp_path, runs=runs, recipe=recipe, methods={"multitask": {"analyse": False}}))
    assert found.jobs[:2] == (base, er)
    found.check()
    for job in found.jobs:
        finish(job)
    er, multitask = found.jobs[1:]
    assert (progress(er).pending, progress(multitask).done) == (("analyse",), True)
    RunFolder(er.folder).mark("analyse", 1.0)
    content, missing = aggregate(found)
    assert (missing, [run["config"] for run in content["runs"]]) == ([], [{"method": "er"}, {"method": "multitask"}])
    write_json(tmp_path / "held.json", content)
    assert len(load_held(found, [tmp_path / "held.json"])) == 2


def test_a_run_without_memory_that_only_replays_is_the_sequential_one(tmp_path: Path) -> None:
    runs = [
        {"suite": "libero_goal", "methods": ["er", "infovla"], "seeds": [0, 1], "orders": ["A"], "memory": [0]},
        {"suite": "libero_goal", "methods": ["sequential"], "seeds": [0], "orders": ["A"], "memory": [1]},
    ]
    benchmark = load_benchmark(write_config(tmp_path, runs=runs))
    same = {job.folder.name: job.same_as and job.same_as.folder.name for job in benchmark.jobs if job.key}
    assert same == {
        "er_A_m0_s0": "sequential_A_m1_s0", "infovla_A_m0_s0": None, "er_A_m0_s1": None, "infovla_A_m0_s1": None,
        "sequential_A_m1_s0": None,
    }  # fmt: skip
    er = next(job for job in benchmark.jobs if job.same_as)
    assert er.same_as is not None
    # Asked for, the run that has its numbers is run, unless another machine holds it.
    assert [job.folder.name for job in benchmark.select([er.name]) if job.key] == ["sequential_A_m1_s0"]
    assert er not in benchmark.select()
    assert er.same_as.key is not None
    assert not [job for job in benchmark.select([er.name], held={er.same_as.key}) if job.key]
    assert er.name in aggregate(benchmark)[1]
    assert f"is {er.same_as.name}" in describe_status(benchmark.jobs, 1)
    finish(er.same_as)
    content, missing = aggregate(benchmark)
    assert er.name not in missing
    runs_found = {run["method"]: run for run in content["runs"]}
    assert runs_found["er"] == {
        **runs_found["sequential"], "method": "er", "memory": 0, "config": {"method": "er"},
        "same_as": er.same_as.name,
    }  # fmt: skip
    path = tmp_path / "held.json"
    write_json(path, content)
    shutil.rmtree(er.same_as.folder)
    again = load_benchmark(write_config(tmp_path, runs=runs))
    assert [run["method"] for run in aggregate(again, load_held(again, [path]))[0]["runs"]] == ["er", "sequential"]
    content["runs"] = [run for run in content["runs"] if run["method"] == "sequential"]
    write_json(path, content)
    assert [run["method"] for run in aggregate(again, load_held(again, [path]))[0]["runs"]] == ["er", "sequential"]


def test_a_method_with_options_of_its_own_is_no_other_s(tmp_path: Path) -> None:
    runs = [{"suite": "libero_goal", "methods": ["er", "sequential"], "seeds": [0], "orders": ["A"], "memory": [0]}]
    methods = {"sequential": {"method": "sequential", "lora_r": 8}}
    benchmark = load_benchmark(write_config(tmp_path, runs=runs, methods=methods))
    assert not [job for job in benchmark.jobs if job.same_as]


# --- the queue ---------------------------------------------------------------------------------------------------


def test_a_whole_queue_and_again(benchmark: Benchmark, tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = queue(benchmark, tmp_path, lines).run()
    assert (len(outcome.done), outcome.failed, outcome.elsewhere) == (10, [], [])
    base, *others = starts(benchmark)
    assert base == f"{benchmark.jobs[0].folder.name} None"  # all cores
    assert sorted(others) == sorted(f"{name} 1" for name in names(benchmark))
    assert any("starts: libero_goal/er_A_m1_s0" in line for line in lines)
    log = (benchmark.jobs[1].folder / "log.txt").read_text(encoding="utf-8")
    assert "fake.py" in log
    assert "working" in log

    outcome = queue(benchmark, tmp_path).run()
    assert len(outcome.done) == 10
    assert len(starts(benchmark)) == 10  # nothing again


def test_the_base_column_is_taken_over(benchmark: Benchmark, tmp_path: Path) -> None:
    rollouts = benchmark.jobs[0].folder / "stages" / "stage_00" / "rollouts"
    rollouts.mkdir(parents=True)
    cell = {"suite": "s", "task": "t", "successes": [True], "steps": [1], "seconds": 1.0, "videos": ["t.mp4"]}
    (rollouts / "t.json").write_text(json.dumps(cell), encoding="utf-8")
    queue(benchmark, tmp_path).run()
    copied = benchmark.jobs[1].folder / "stages" / "stage_00" / "rollouts" / "t.json"
    assert read_cell(copied, 0) == TaskResult.from_dict({**cell, "videos": []})


@pytest.mark.libero
def test_a_run_on_a_shared_base_is_the_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fakes(monkeypatch, tmp_path)
    options = {**STREAM, **TRAINING, "eval_episodes": 3, "final_eval_episodes": 5}
    benchmark = load_benchmark(write_config(tmp_path, recipe=options))
    base, job = benchmark.jobs[:2]
    assert not progress(base).done
    learn_base(*load_recipe(base.recipe))
    assert progress(base).done
    take_over_base(job)
    FakePool.calls.clear()
    with Stream(*load_recipe(job.recipe)) as stream:
        stream.run()
    assert len(FakePool.calls) == 3 + 4  # nothing of the base column
    assert progress(job).done
    shared = Results.load(job.folder / "results.json")

    own = {**job.recipe, "base_model": "tiny", "output_dir": str(tmp_path / "own")}
    with Stream(*load_recipe(own)) as stream:
        stream.run()
    alone = Results.load(tmp_path / "own" / "results.json")
    assert shared.successes == alone.successes
    assert shared.episodes == alone.episodes == [[3, 3, 5], [3, 3, 5], [None, 3, 5], [None, None, 5]]
    for adapter in sorted((tmp_path / "own" / "adapters").iterdir()):
        ours = load_file(job.folder / "adapters" / adapter.name / "adapter_model.safetensors")
        for name, weights in load_file(adapter / "adapter_model.safetensors").items():
            assert torch.equal(ours[name], weights)


def test_a_queue_needs_a_worker(benchmark: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers and cores_per_run must be at least 1"):
        queue(benchmark, tmp_path, workers=0)


def test_a_failed_run_is_reported_and_the_queue_goes_on(benchmark: Benchmark, tmp_path: Path) -> None:
    crash, early = benchmark.jobs[1], benchmark.jobs[2]
    for job, marker in ((crash, "crash"), (early, "early")):
        job.folder.mkdir(parents=True)
        (job.folder / marker).touch()
    lines: list[str] = []
    outcome = queue(benchmark, tmp_path, lines).run()
    assert len(outcome.done) == 8
    reasons = {failure.job.name: failure for failure in outcome.failed}
    assert reasons[crash.name].reason == "exit code 3"
    assert reasons[crash.name].log.splitlines()[-2:] == ["    20 %", "    it is broken"]
    assert reasons[early.name].reason == "ended without having measured every stage"
    assert any("it is broken" in line for line in lines)
    status = describe_status(benchmark.jobs, 2)
    assert f"exit code 3; see {crash.folder / 'log.txt'}" in status
    assert "8 done" in status

    for marker in (crash.folder / "crash", early.folder / "early"):
        marker.unlink()
    assert len(queue(benchmark, tmp_path).run().done) == 10  # the same command tries again


def test_a_run_is_done_when_all_that_it_was_asked_for_is(tmp_path: Path) -> None:
    """An analysis or a last push that failed is made up for by the same command."""
    recipe = {**CONFIG["recipe"], "analyse": True, "push_to_hub": True, "hub_model_id": "me/runs"}
    found = load_benchmark(write_config(tmp_path, recipe=recipe))
    job = next(job for job in found.jobs if not job.is_base)
    run_products(job, job.folder)
    assert (progress(job).done, progress(job).pending) == (False, ("analyse", "push_02"))
    for step in ("analyse", "push_02"):
        RunFolder(job.folder).mark(step, 1.0)
    assert progress(job).done


def test_a_folder_that_cannot_be_used_stops_its_run_alone(benchmark: Benchmark, tmp_path: Path) -> None:
    job = benchmark.jobs[2]
    job.folder.parent.mkdir(parents=True)
    job.folder.write_text("a file in its place", encoding="utf-8")
    outcome = queue(benchmark, tmp_path).run()
    assert (len(outcome.done), len(outcome.failed), outcome.elsewhere) == (9, 1, [])
    assert outcome.failed[0].reason.startswith(f"{job.folder} cannot be used: ")
    assert job.name in describe_status(benchmark.jobs, 2)


def test_a_disk_without_locks_is_no_other_process(
    benchmark: Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    outcome = queue(benchmark, tmp_path).run()
    assert (outcome.done, outcome.elsewhere) == ([], [])
    assert "without locks two processes could write the same files; choose a folder on a local" in (
        outcome.failed[0].reason
    )
    with pytest.raises(RunError, match="cannot be locked"):
        RunFolder(tmp_path / "run").open({})


def test_a_note_of_the_queue_that_is_none_is_not_read(benchmark: Benchmark) -> None:
    for job, note in zip(
        benchmark.jobs[1:], ("null", "[]", '{"started": "noon"}', '{"started": 1e300}'), strict=False
    ):
        job.folder.mkdir(parents=True)
        (job.folder / "queue.json").write_text(note, encoding="utf-8")
        lock = claim(job)
        assert lock is not None
        with lock:
            assert job.name in describe_status(benchmark.jobs, 2)


def test_a_damaged_cell_of_a_base_stops_its_runs_alone(tmp_path: Path) -> None:
    found = load_benchmark(write_config(tmp_path))
    first = found.jobs[0]
    run_products(first, first.folder)
    cell = RunFolder(first.folder).stage(0) / "rollouts" / "task.json"
    cell.parent.mkdir(parents=True)
    cell.write_text('{"torn')
    outcome = queue(found, tmp_path).run()
    stopped = {job.name for job in found.jobs if job.base == first}
    assert {failure.job.name for failure in outcome.failed} == stopped
    assert all("task.json" in failure.reason for failure in outcome.failed)
    assert {job.name for job in outcome.done} == {job.name for job in found.jobs} - stopped


def test_without_its_base_no_run_starts(benchmark: Benchmark, tmp_path: Path) -> None:
    benchmark.jobs[0].folder.mkdir(parents=True)
    (benchmark.jobs[0].folder / "crash").touch()
    outcome = queue(benchmark, tmp_path).run()
    assert len(outcome.failed) == 10
    assert "is not finished" in outcome.failed[1].reason
    assert len(starts(benchmark)) == 1


def test_a_run_of_another_queue_is_left_alone(benchmark: Benchmark, tmp_path: Path) -> None:
    lock = claim(benchmark.jobs[3])
    assert lock is not None
    with lock:
        assert claim(benchmark.jobs[3]) is None
        outcome = queue(benchmark, tmp_path).run()
        assert [job.name for job in outcome.elsewhere] == [benchmark.jobs[3].name]
        assert len(outcome.done) == 9
    assert len(queue(benchmark, tmp_path).run().done) == 10


def two_bases(tmp_path: Path) -> Benchmark:
    """A base, a run of it, another base with a run, and another run of the first."""
    runs: list[dict[str, Any]] = [
        {"suite": "libero_goal", "methods": ["er"], "seeds": [0], "orders": ["A"]},
        {"suite": "libero_goal", "methods": ["er"], "seeds": [0], "orders": ["C"]},
        {"suite": "libero_goal", "methods": ["er"], "seeds": [1], "orders": ["A"]},
    ]
    benchmark = load_benchmark(write_config(tmp_path, runs=runs))
    assert [job.is_base for job in benchmark.jobs] == [True, False, True, False, False]
    return benchmark


def test_a_base_that_has_to_wait_keeps_no_worker_idle(tmp_path: Path) -> None:
    benchmark = two_bases(tmp_path)
    first_base, first, second_base, second, last = benchmark.jobs
    first.folder.mkdir(parents=True)
    (first.folder / "until").write_text(str(last.folder / "started"))
    outcome = queue(benchmark, tmp_path).run()
    assert (len(outcome.done), outcome.failed) == (5, [])
    assert [line.split()[0] for line in starts(benchmark)] == [
        job.folder.name for job in (first_base, first, last, second_base, second)
    ]

    (tmp_path / "again").mkdir()
    again = two_bases(tmp_path / "again")  # one at a time, no core is idle: all in their order
    assert len(queue(again, tmp_path / "again", workers=1).run().done) == 5
    assert [line.split()[0] for line in starts(again)] == [job.folder.name for job in again.jobs]


def test_a_base_of_another_queue_holds_up_only_what_needs_it(tmp_path: Path) -> None:
    benchmark = two_bases(tmp_path)
    first_base, first, second_base, second, last = benchmark.jobs
    run_products(first_base, first_base.folder)
    lock = claim(second_base)
    assert lock is not None
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("waiting"):
            threading.Timer(1.5, lock.close).start()  # it looks again until then

    outcome = queue(benchmark, tmp_path, say=say).run()
    assert (len(outcome.done), outcome.failed, outcome.elsewhere) == (5, [], [])
    order = [line.split()[0] for line in starts(benchmark)]
    assert order == [job.folder.name for job in (first, last, second_base, second)]
    assert [line for line in lines if "another process" in line] == [
        f"waiting for {second_base.name}, which another process is running"
    ]


def test_two_queues_at_once_run_nothing_twice(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from test_benchmark import queue, load_benchmark\n"
        "outcome = queue(load_benchmark(sys.argv[2]), Path(sys.argv[3]), workers=1).run()\n"
        "print(len(outcome.done), len(outcome.failed), len(outcome.elsewhere))\n"
    )
    benchmark = load_benchmark(config)
    command = fake_command(tmp_path)
    for job in benchmark.jobs:  # made beforehand, as both queues would make them
        job.folder.mkdir(parents=True)
        (job.folder / "recipe.yaml").write_text(yaml.safe_dump(dict(job.recipe)), encoding="utf-8")
        command(job, job.folder / "recipe.yaml")
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(config), str(tmp_path)]
    both = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert all(" 0 " in output for output in outputs), outputs
    assert sorted(line.split()[0] for line in starts(benchmark)) == sorted(job.folder.name for job in benchmark.jobs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_queue_ends_its_runs_and_continues(tmp_path: Path, number: int) -> None:
    benchmark = load_benchmark(write_config(tmp_path))
    for job in benchmark.jobs[1:3]:
        job.folder.mkdir(parents=True)
        (job.folder / "hang").touch()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from infovla_peft.cli import run_command\n"
        "from test_benchmark import queue, load_benchmark\n"
        "work = queue(load_benchmark(sys.argv[2]), Path(sys.argv[3])).run\n"
        "sys.exit(run_command(lambda: work() and None))\n"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "bench.yaml"), str(tmp_path)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    started = [job.folder / "started" for job in benchmark.jobs[1:3]]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    children = [int(file.read_text()) for file in started]
    assert describe_status(benchmark.jobs, 2).count("running") == 3  # two rows and the summary
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in errors
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    status = describe_status(benchmark.jobs, 2)
    assert "2 stopped" in status
    assert "1 done" in status

    for job in benchmark.jobs[1:3]:
        (job.folder / "hang").unlink()
    assert len(queue(benchmark, tmp_path).run().done) == 10


def test_a_log_tail_shows_the_last_state_of_a_bar(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_bytes(b"first\n\n 1%\r 2%\r\n 5%\r 9%\nlast\n")
    assert log_tail(tmp_path / "log.txt") == "    first\n     2%\n     9%\n    last"
    assert log_tail(tmp_path / "log.txt", lines=1) == "    last"
    assert log_tail(tmp_path / "none.txt") == ""


# --- progress and the aggregate ----------------------------------------------------------------------------------


def finish(job: Job, change: Callable[[Results], None] = lambda _: None) -> None:
    run_products(job, job.folder)
    if not job.is_base:
        results = Results.load(job.folder / "results.json")
        change(results)
        results.save(job.folder / "results.json")


def test_a_run_that_was_made_otherwise_does_not_count(benchmark: Benchmark, tmp_path: Path) -> None:
    finish(benchmark.jobs[0])
    finish(benchmark.jobs[1], lambda results: results.config.update(learning_rate=0.5))
    found = progress(benchmark.jobs[1])
    assert not found.done
    assert "learning_rate 0.5 -> 0.001" in str(found.problem)
    assert "move it away" in str(found.problem)
    with pytest.raises(ValueError, match="learning_rate"):
        aggregate(benchmark)
    assert "unusable" in describe_status(benchmark.jobs, 2)
    outcome = queue(benchmark, tmp_path).run()
    assert [failure.job.name for failure in outcome.failed] == [benchmark.jobs[1].name]


def test_an_option_that_a_run_did_not_know_had_its_default(tmp_path: Path) -> None:
    found = load_benchmark(write_config(tmp_path))
    finish(found.jobs[0])
    finish(found.jobs[2], lambda results: results.config.pop("rac_pooling") and None)
    assert progress(found.jobs[2]).problem is None
    asked = load_benchmark(write_config(tmp_path, recipe={**CONFIG["recipe"], "rac_pooling": "prompt"}))
    assert "rac_pooling None -> 'prompt'" in str(progress(asked.jobs[2]).problem)


def test_what_a_method_does_not_read_may_differ(benchmark: Benchmark) -> None:
    er, rac_only = benchmark.jobs[1:3]
    for job in (er, rac_only):
        finish(job, lambda results: results.config.update(lambda_rac=7.0, rac_targets="hard"))
    assert (er.recipe["method"], progress(er).problem) == ("er", None)
    assert "lambda_rac 7.0" in str(progress(rac_only).problem)
    results = Results.load(er.folder / "results.json")
    results.config["replay_fraction"] = 0.25  # which it does read
    results.save(er.folder / "results.json")
    assert "replay_fraction" in str(progress(er).problem)


def test_what_changes_no_number_may_differ(benchmark: Benchmark) -> None:
    finish(benchmark.jobs[1], lambda results: results.config.update(eval_workers=7, processes=2, save_steps=9))
    finish(benchmark.jobs[2], lambda results: results.config.pop("anchor_views"))  # of a version without it
    assert progress(benchmark.jobs[1]).done
    assert progress(benchmark.jobs[2]).done


def test_a_damaged_run_is_named(benchmark: Benchmark) -> None:
    finish(benchmark.jobs[1])
    (benchmark.jobs[1].folder / "results.json").write_text("{", encoding="utf-8")
    assert "no valid JSON" in str(progress(benchmark.jobs[1]).problem)


def analysed(job: Job, table: list[list[float | None]]) -> None:
    """Leave an analysis in the run's folder; all its tables are this one."""
    tasks = results_of(job).tasks[: len(table)]
    Analysis(
        method="er", stream="B2-2N1", suite="libero_goal", seed=0, base_model="tiny", assets="official", frames=1,
        demonstrations=1, tap_layer=-1, temperature=0.1, stages=len(table[0]),
        tasks=[ProbedTask(task.name, task.instruction, task.learned_at, 1, [0]) for task in tasks],
        **dict.fromkeys(RANGES, table),  # type: ignore[arg-type]
    ).save(job.folder)  # fmt: skip


def test_an_aggregate_holds_the_finished_runs(benchmark: Benchmark) -> None:
    for job in benchmark.jobs[:4]:
        finish(job)
    adapter = benchmark.jobs[1].folder / "adapters" / "stage_01_task_2"
    adapter.mkdir(parents=True)
    write_info(adapter, AdapterInfo("../../base", {"config": "c", "weights": "w"}, "libero_goal", stage=1))
    whole = [[0.1, 0.2, 0.1234567], [0.1, 0.2, 0.3], [None, 0.1, 0.1], [None, None, 0.1]]
    analysed(benchmark.jobs[2], whole)
    analysed(benchmark.jobs[3], [row[:2] for row in whole[:3]])  # before its last stage
    log = benchmark.jobs[2].folder / "stages" / "stage_02" / "log.jsonl"
    log.parent.mkdir(parents=True)
    entries = [{"step": 1, "rac": 1.0, "grad_norm_rac": 0.25}, {"step": 2, "rac": 1.0, "grad_norm_rac": 0.75}]
    log.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    content, missing = aggregate(benchmark)
    assert missing == [f"libero_goal/{name}" for name in names(benchmark)[3:]]
    runs = read_comparison(json.loads(json.dumps(content))).runs
    assert [(run.method, run.seed, run.order, run.memory) for run in runs] == [
        ("er", 0, "A", 1), ("rac_only", 0, "A", 1), ("er", 0, "B", 1),
    ]  # fmt: skip
    assert [run.base for run in runs] == ["w", None, None]
    rounded = [[0.1, 0.2, 0.123457], *whole[1:]]
    assert [run.analysis for run in runs] == [None, {"cka": rounded, "action_error": rounded}, None]
    assert [run.gradients for run in runs] == [None, {"grad_norm_rac": [None, None, 0.5]}, None]
    assert runs[1].config == {"method": "infovla", "lambda_cmi": 0.0}
    assert runs[0].config == {"method": "er"}
    assert all(run["same_as"] is None for run in content["runs"])
    assert (runs[0].train_seconds, runs[0].evaluate_seconds) == (200.0, 100.0)  # without the shared base
    assert runs[0].success == [[0.5] * 3, [0.5] * 3, [None, 0.5, 0.5], [None, None, 0.5]]
    assert (runs[0].learned_at, runs[0].tasks[-1]) == ([0, 0, 1, 2], "task_3")
    assert content["protocol"]["suites"]["libero_goal"]["orders"]["B"] == [0, 1, 3, 2]
    assert str(benchmark.output_dir) not in json.dumps(content)


def other_machine(
    benchmark: Benchmark, tmp_path: Path, change: Callable[[dict[str, Any]], None] = lambda _: None
) -> Path:
    """The aggregate of the first two runs, which this machine then lacks."""
    for job in benchmark.jobs[1:3]:
        finish(job)
    content, _ = aggregate(benchmark)
    change(content)
    for job in benchmark.jobs[1:3]:
        shutil.rmtree(job.folder)
    (tmp_path / "other.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "other.json"


def test_machines_share_a_benchmark(benchmark: Benchmark, tmp_path: Path) -> None:
    other = other_machine(benchmark, tmp_path)
    held = load_held(benchmark, [other, other])
    taken = [job.key for job in benchmark.jobs[1:3]]
    assert list(held) == taken
    left = benchmark.select(held=held)
    assert [job.key for job in benchmark.jobs if job not in left] == taken
    assert benchmark.select(["er"], held=[job.key for job in benchmark.jobs if job.key]) == []  # nor a base for nobody

    for job in benchmark.jobs[3:5]:
        finish(job)
    content, missing = aggregate(benchmark, held)
    keys = [
        module.RunKey(run.suite, run.method, run.seed, run.order, run.memory) for run in read_comparison(content).runs
    ]
    assert keys == [job.key for job in benchmark.jobs[1:5]]
    assert len(missing) == len(names(benchmark)) - 4
    own = aggregate(benchmark)[0]["runs"]
    assert [run for run in content["runs"] if run in own] == own


def test_an_aggregate_is_replaced_by_a_whole_one_alone(benchmark: Benchmark, tmp_path: Path) -> None:
    path = other_machine(benchmark, tmp_path)
    finish(benchmark.jobs[3])
    lost = r"holds 2 runs that are not here, such as libero_goal/er, seed 0, order A, memory 1; `--held .*other.json` "
    with pytest.raises(ValueError, match=f"{lost}keeps those of this benchmark, another --output leaves"):
        check_replacement(path, aggregate(benchmark)[0])
    check_replacement(tmp_path / "new.json", aggregate(benchmark)[0])
    content, _ = aggregate(benchmark, load_held(benchmark, [path]))
    check_replacement(path, content)
    changed = copy.deepcopy(content)
    changed["runs"][0]["success"][0][0] = 1.0
    with pytest.raises(
        ValueError, match=r"holds libero_goal/er, seed 0, order A, memory 1 with other numbers; move the file away"
    ):
        check_replacement(path, changed)
    unknown = copy.deepcopy(content)  # as in aggregates of before there were bases in them
    known = content["runs"][0]["base"]
    unknown["runs"][0]["base"] = None
    write_json(tmp_path / "unknown.json", unknown)
    write_json(path, content)
    check_replacement(tmp_path / "unknown.json", content)
    for files_in_turn in ([tmp_path / "unknown.json", path], [path, tmp_path / "unknown.json"]):
        assert next(iter(load_held(benchmark, files_in_turn).values())).base == known
    write_json(tmp_path / "changed.json", changed)
    with pytest.raises(ValueError, match="has other numbers in another of these files; leave one out"):
        load_held(benchmark, [path, tmp_path / "changed.json"])
    finish(benchmark.jobs[1])
    with pytest.raises(ValueError, match="has other numbers than the run that is held"):
        aggregate(benchmark, load_held(benchmark, [tmp_path / "changed.json"]))
    content["runs"][0]["assets"] = "another"
    for output in (path, tmp_path / "new.json"):
        with pytest.raises(ValueError, match=r"\(not written\).* must be those of libero_goal's other runs"):
            check_replacement(output, content)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be read: move it away first"):
        check_replacement(path, aggregate(benchmark)[0])


def defaults(content: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = content["protocol"]["suites"]["libero_goal"]["options"]
    return options


def test_of_another_version_s_defaults_those_count_that_the_run_read(benchmark: Benchmark, tmp_path: Path) -> None:
    def of_another_version(content: dict[str, Any]) -> None:
        defaults(content).update(lambda_ewc=7.0, merge_weight=0.3, lambda_output=0.5)
        content["runs"][1]["config"]["lambda_output"] = 0.3
        content["runs"][0]["config"]["unheard_of"] = None

    held = list(load_held(benchmark, [other_machine(benchmark, tmp_path, of_another_version)]).values())
    assert [run.config for run in held] == [{"method": "er"}, {"method": "infovla", "lambda_cmi": 0.0}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(runs=[{**c["runs"][0], "seed": 9}]),
            "other.json holds no run of bench, but 1 others, such as libero_goal/er, seed 9, order A, memory 1; leave",
        ),
        (lambda c: c["protocol"]["suites"]["libero_goal"]["orders"]["A"].reverse(), "is not run there as in"),
        (lambda c: c["protocol"]["suites"]["libero_goal"]["orders"].pop("A"), "is not run there as in"),
        (lambda c: c["protocol"]["suites"]["libero_goal"].pop("orders"), "is not run there as in"),
        (lambda c: c["protocol"]["suites"]["libero_goal"]["recipe"].update(eval_episodes=3), "is not run there as in"),
        (lambda c: c["protocol"].pop("suites"), "is not run there as in"),
        (lambda c: c["runs"][1]["config"].pop("lambda_cmi"), "rac_only_A_m1_s0 was run with another lambda_cmi"),
        (lambda c: c["runs"][0].update(base_seed=1), "er_A_m1_s0 was run with base_seed 1, here it is 0"),
        (lambda c: c["runs"][0]["config"].update(learning_rate=1e-5), "was run with another learning_rate"),
        (lambda c: c["runs"][0]["success"].pop(), "tables of 4 rows"),
        (lambda c: defaults(c).pop("temperature"), "rac_only_A_m1_s0 was run with another temperature"),
        (lambda c: defaults(c).update(temperature=0.1), "rac_only_A_m1_s0 was run with another temperature"),
        (lambda c: defaults(c).update(unheard_of=True), "er_A_m1_s0 was run with another unheard_of"),
        (lambda c: c["protocol"]["suites"]["libero_goal"].pop("options"), "does not say the defaults of the version"),
    ],
)
def test_a_run_of_another_benchmark_is_refused(
    benchmark: Benchmark, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_held(benchmark, [other_machine(benchmark, tmp_path, change)])


def test_a_larger_benchmark_s_runs_are_taken_as_far_as_both_have_them(benchmark: Benchmark, tmp_path: Path) -> None:
    path = other_machine(benchmark, tmp_path)
    (tmp_path / "small").mkdir()
    suites = {"libero_goal": {"orders": {"A": [0, 1, 2, 3]}}}
    runs = [{"suite": "libero_goal", "methods": ["rac_only", "ewc"], "seeds": [0], "orders": ["A"]}]
    small = load_benchmark(write_config(tmp_path / "small", suites=suites, runs=runs))
    lines: list[str] = []
    held = load_held(small, [path], say=lines.append)
    assert list(map(str, held)) == ["libero_goal/rac_only, seed 0, order A, memory 1"]
    assert lines == [f"{path}: 1 of 2 runs taken for bench"]
    content, missing = aggregate(small, held)
    assert ([run["method"] for run in content["runs"]], missing) == (["rac_only"], ["libero_goal/ewc_A_m1_s0"])
    with pytest.raises(ValueError, match=r"holds 1 run that is not here, such as libero_goal/er"):
        check_replacement(path, content)  # what was left out is not lost
    check_replacement(tmp_path / "small.json", content)


def test_some_of_the_held_runs_are_taken(benchmark: Benchmark, tmp_path: Path) -> None:
    path = other_machine(benchmark, tmp_path)
    lines: list[str] = []
    er, rac_only = (job.key for job in benchmark.jobs[1:3])
    assert list(load_held(benchmark, [path], ["er"], say=lines.append)) == [er]
    assert lines == [f"{path}: 1 of 2 runs taken for bench"]
    assert list(load_held(benchmark, [path], ["*/rac_only_A_*", "er"], say=lines.append)) == [er, rac_only]
    assert len(lines) == 1
    with pytest.raises(ValueError, match=r"holds no run of bench, of those that were chosen, but 2 others"):
        load_held(benchmark, [path], ["*_s1"])
    with pytest.raises(ValueError, match="no run of rac; there are er, rac_only"):
        load_held(benchmark, [path], ["rac"])


def test_bench_s_terms_takes_the_runs_of_one_term() -> None:
    found = load_benchmark(REPOSITORY / "recipes/configs/bench/bench_s_terms.yaml")
    file = REPOSITORY / "recipes/results/bench_s.json"
    held = load_held(found, [file], ["infovla_rac_only", "infovla_cmi_only"])
    assert {(key.method, run.base and run.base[:4]) for key, run in held.items()} == {
        ("infovla_rac_only", "b5fe"), ("infovla_cmi_only", "b5fe"),
    }  # fmt: skip
    assert len(held) == 6
    assert len(load_held(found, [file])) == 12


def test_the_status_of_held_runs(benchmark: Benchmark, tmp_path: Path) -> None:
    other = other_machine(benchmark, tmp_path)
    for job in benchmark.jobs[:2]:
        finish(job)
    status = describe_status(benchmark.jobs, 1, load_held(benchmark, [other]))
    states = {line.split()[0]: line.split()[1:3] for line in status.splitlines()[1:-1]}
    assert states[benchmark.jobs[1].name] == ["done", "3/3"]
    assert states[benchmark.jobs[2].name] == ["held", "3/3"]
    assert "2 done, 1 held, 7 waiting" in status
    hours = 7 * progress(benchmark.jobs[1]).seconds / 3600
    assert f"about {hours:.1f} h to go" in status
    for job in benchmark.jobs[:2]:
        shutil.rmtree(job.folder)
    everything = {job.key for job in benchmark.jobs if job.key}
    assert "1 unneeded, 9 held" in describe_status(benchmark.jobs, 1, everything)
    assert "10 waiting" in describe_status(benchmark.jobs, 1)


# --- the script --------------------------------------------------------------------------------------------------


def test_the_script_is_short_and_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert len((REPOSITORY / "recipes" / "benchmark.py").read_text(encoding="utf-8").splitlines()) < 200
    with pytest.raises(SystemExit) as ended:
        script("benchmark").parse(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("run", "status", "aggregate", "tables", "bench_s.yaml"))
    for command in ("run", "status", "aggregate"):
        with pytest.raises(SystemExit):
            script("benchmark").parse([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "`python recipes/continual.py --help` has the options of its runs" in text
        assert all(option in text for option in ("--held JSON", "--held-only METHOD"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "x.yaml", "--workers", "0", "--dry-run"], "argument --workers: 0 is not a positive number"),
        (["run", "x.yaml", "--workers=-2"], "argument --workers: -2 is not a positive number"),
        (["status", "x.yaml", "--held-only", "er"], "--held-only chooses among what --held names; name"),
        (["tabels", "x.json"], "invalid choice: 'tabels'; did you mean tables?"),
    ],
)
def test_the_script_refuses_what_it_cannot_do(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        script("benchmark").parse(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_script_says_which_tables_it_has_written(
    benchmark: Benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aggregated = other_machine(benchmark, tmp_path)
    block = "<!-- table{} show=means -->\n<!-- end -->\n"
    texts = {
        "two": block.format(" of=bench") + block.format(""),
        "one": block.format(""),
        "none": block.format(" of=x"),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.md").write_text(text, encoding="utf-8")

    def refresh(*names: str) -> str:
        options = script("benchmark").parse(
            ["refresh", str(aggregated), *(str(tmp_path / f"{name}.md") for name in names)]
        )
        options.handler(options)
        return capsys.readouterr().out

    two, one, none = refresh("two", "one", "none").splitlines()
    assert two.endswith("two.md: 2 tables of other.json")
    assert one.endswith("one.md: 1 table of other.json")
    assert none.endswith("none.md: 0 tables of other.json")
    assert "| `er` | 1 |" in (tmp_path / "one.md").read_text(encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"no table of .*other.json in .*none.md; a block is `<!-- table of=bench show="
    ):
        refresh("none")
    before = (tmp_path / "one.md").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"there is no text at .*nosuch.md; name Markdown files with"):
        refresh("one", "nosuch")
    assert (tmp_path / "one.md").read_bytes() == before


@pytest.mark.libero
def test_the_script_from_the_queue_to_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = script("benchmark")
    config = write_config(tmp_path)

    def call(*argv: str) -> tuple[int, str]:
        options = recipe.parse([*argv])
        code = options.handler(options) or 0
        return code, capsys.readouterr().out

    code, text = call("run", str(config), "--dry-run", "--only", "er")
    assert code == 0
    assert "libero_goal/er_B_m1_s1" in text
    assert "rac_only" not in text
    assert not (tmp_path / "bench").exists()
    with pytest.raises(ValueError, match=r"no run of .* is finished yet"):
        call("aggregate", str(config))

    recipe.command = fake_command(tmp_path)
    code, text = call("run", str(config), "--workers", "2", "--only", "er")
    assert code == 0
    assert "6 of 6 finished, 0 failed" in text
    _, text = call("status", str(config))
    assert "6 done, 4 waiting" in text
    aggregated = tmp_path / "bench_x.json"
    _, text = call("aggregate", str(config), "--output", str(aggregated))
    assert "5 runs, 4 missing" in text
    assert "missing: libero_goal/rac_only_A_m1_s0" in text
    _, text = call("run", str(config), "--dry-run", "--held", str(aggregated))
    assert "er_A_m1_s0" not in text
    assert "rac_only_A_m1_s0" in text
    _, text = call("run", str(config), "--dry-run", "--held", str(aggregated), "--held-only", "*_s0")
    assert "3 of 5 runs taken" in text
    assert "libero_goal/er_A_m1_s1" in text
    _, text = call("status", str(config), "--held", str(aggregated))
    assert "6 done, 4 waiting" in text
    _, text = call("aggregate", str(config), "--held", str(aggregated), "--output", str(aggregated))
    assert "5 runs, 4 missing" in text
    before = aggregated.read_bytes()
    shutil.move(tmp_path / "bench" / "libero_goal" / "er_A_m1_s0", tmp_path / "away")
    with pytest.raises(ValueError, match=r"holds 1 run that is not here.*keeps those of this benchmark"):
        call("aggregate", str(config), "--output", str(aggregated))
    assert aggregated.read_bytes() == before
    shutil.move(tmp_path / "away", tmp_path / "bench" / "libero_goal" / "er_A_m1_s0")
    _, text = call("tables", str(aggregated))
    assert (tmp_path / "bench_x_tables" / "tables.md").exists()
    assert "matrices_libero_goal_m1_A.png" in text
    with pytest.raises(ValueError, match="no run of rac_only"):
        call("tables", str(aggregated), "--methods", "er", "rac_only")

    first = tmp_path / "bench" / "libero_goal" / "rac_only_A_m1_s0"
    first.mkdir()
    (first / "crash").touch()
    code, text = call("run", str(config))
    assert code == 1
    assert "it is broken" in text
    assert "9 of 10 finished, 1 failed" in text


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0
