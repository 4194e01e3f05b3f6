"""A benchmark: methods x seeds x task orders x memory sizes on some suites, as runs that share what they can share.

A YAML file describes it::

    output_dir: runs/bench                   one folder per run below it
    cores_per_run: 1                         threads and simulation processes of a run (default 1)
    workers: 2                               runs at once (default: as many as there are cores for)
    recipe: {stream: B5-5N1, ...}            options that all runs have in common
    suites:
      libero_goal:                           a name; LIBERO's, unless the option `suite` says another
        orders: {A: [0, 1, 2], B: [0, 2, 1]} tasks in the order of learning
        image_size: 128                      options of this suite
    methods:                                 rows of the tables that are more than the name of a method
      infovla_rac_only: {method: infovla, lambda_cmi: 0}
      multitask: {analyse: false}            if `recipe` says analyse: it has no demonstrations left for that
    runs:                                    the most informative first; seeds change slowest within an entry
      - {suite: libero_goal, methods: [er, infovla_rac_only], seeds: [0, 1], orders: [A], memory: [1]}
      - {suite: libero_goal, methods: [er], seeds: [2], orders: [A], base_seed: 1}

Runs with the same base tasks, in the same order, share their base: it is trained (or, if it is a checkpoint, taken)
and measured once, by a run of its own, and the demonstrations of the suite are recorded then. A base does not depend
on the seed, so that seeds differ in what is compared here: the learning of the new tasks. How much of a result is one
base's say runs on another: `base_seed` (default 0) chooses which tiny base an entry's runs start from. With nothing
stored (`memory: [0]`), methods that only replay are `sequential`: where that is a run too, its numbers are theirs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .config import InfoVLAConfig, StreamConfig, check_option_names, load_recipe, parse_stream, resolved_config
from .measurement import read_cell, write_cell
from .methods import METHODS, unread_options, without_memory
from .preflight import check_batches, check_recipe
from .reading import read_yaml
from .recipe_files import recipes_folder
from .results import Results, ResultsError
from .run_folder import HARMLESS, RunError, RunFolder, changed_keys
from .stream import Stream

ADAPTER_OPTIONS = frozenset(
    {
        "lambda_rac",
        "lambda_cmi",
        "lambda_output",
        "lambda_ewc",
        "ewc_samples",
        "ewc_decay",
        "mir_candidates",
        "merge_weight",
        "counterfactual_share",
        "counterfactual_frames",
        "cmi_mode",
        "rac_targets",
        "rac_center",
        "rac_pooling",
        "temperature",
        "teacher",
        "tap_layer",
        "anchor_bank",
        "near_duplicate_window",
        "replay_fraction",
        "replay_balance",
        "anchor_views",
        "adapter_init",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_targets",
        "stage_steps",
        "learning_rate",
        "per_device_train_batch_size",
        "final_eval_episodes",
    }
)
"""What the base does not depend on. An option that is missing here costs no more than a base trained again."""
OWN_OPTIONS = frozenset({"output_dir", "seed", "tasks", "memory_trajectories", "method"})
"""What a run's place in the benchmark decides."""
BOOKKEEPING = HARMLESS | {
    "use_cpu",
    "bf16",
    "fp16",
    "assets_folder",
    "processes",
    "demonstrations_folder",
}
"""What may differ between the machine that ran and the one that reads, or is no choice of the method."""
_OF_A_METHOD = frozenset({"stage_steps", "analyse"})
"""Options of the stream that methods may differ in: how long they train, and what is looked at afterwards."""
_ENTRY_KEYS = ("suite", "methods", "seeds", "orders", "memory", "base_seed")


class BenchmarkError(ValueError):
    """A benchmark's YAML that cannot be used; the message names the file and the place."""


class RunKey(NamedTuple):
    """Which run of the benchmark. `suite` and `method` are the names that the benchmark gives them."""

    suite: str
    method: str
    seed: int
    order: str
    memory: int

    def __str__(self) -> str:
        return f"{self.suite}/{self.method}, seed {self.seed}, order {self.order}, memory {self.memory}"


@dataclass(frozen=True)
class Job:
    """One run: a base that others start from (`key` is None), or a run that is compared.

    Attributes:
        name: unique, and its folder below the benchmark's.
        folder: of the run.
        recipe: all its options.
        base: the run whose base and whose measured base column this one takes over.
        same_as: the run that this one would repeat bit for bit, so that its numbers are taken: with nothing stored,
            replay is `sequential`.
    """

    name: str
    folder: Path
    recipe: Mapping[str, Any] = field(hash=False)
    key: RunKey | None = None
    base: Job | None = None
    same_as: Job | None = None

    @property
    def is_base(self) -> bool:
        return self.key is None

    @property
    def base_seed(self) -> int:
        return int((self.base or self).recipe["seed"])


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        stages: evaluated so far, base included.
        planned: stages of the whole run.
        pending: steps after the last stage that the recipe asks for (analysis, push) and that are not done.
        seconds: spent in finished steps.
        problem: why the run can neither be counted nor continued; None if all is well.
    """

    stages: int
    planned: int
    seconds: float
    problem: str | None = None
    pending: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.stages == self.planned and not self.pending and self.problem is None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as its YAML describes it.

    Attributes:
        name: of the file.
        jobs: all runs in their order, each base before the first run that needs it.
        common: name of a suite -> the options that all its runs have in common.
        orders: name of a suite -> name of an order -> tasks, as in the file.
        workers: runs at once; None for as many as there are cores for.
    """

    name: str
    output_dir: Path
    jobs: tuple[Job, ...]
    common: Mapping[str, Mapping[str, Any]]
    orders: Mapping[str, Mapping[str, Sequence[Any]]]
    cores_per_run: int
    workers: int | None

    def select(self, only: Iterable[str] | None = None, *, held: Container[RunKey] = ()) -> list[Job]:
        """Some of the runs, and the bases they need, in the benchmark's order. None repeats another (`Job.same_as`).

        Args:
            only: methods, or names of runs as `status` shows them, with wildcards ("libero_object/*"); None for all.
            held: runs to leave out, as another machine has finished them.

        Raises:
            ValueError: no run is meant by one of `only`.
        """
        runs = {job.name: job.key for job in self.jobs if job.key}
        meant = set(runs.values()) if only is None else self.meant_by(only)
        chosen = {name for name, key in runs.items() if key in meant}
        same = {job.name: job.same_as.name for job in self.jobs if job.same_as}
        chosen = {same.get(name, name) for name in chosen if runs[name] not in held}
        chosen = {name for name in chosen if runs[name] not in held}
        chosen |= {job.base.name for job in self.jobs if job.base and job.name in chosen}
        return [job for job in self.jobs if job.name in chosen]

    def meant_by(self, names: Iterable[str]) -> frozenset[RunKey]:
        """The runs of these methods or names, with wildcards (see `select`).

        Raises:
            ValueError: no run is meant by one of them.
        """
        runs = {job.name: job.key for job in self.jobs if job.key}
        meant = {one: {key for run, key in runs.items() if key.method == one or fnmatch(run, one)} for one in names}
        if strange := ", ".join(sorted(one for one in meant if not meant[one])):
            methods = ", ".join(sorted({key.method for key in runs.values()}))
            raise ValueError(f"no run of {strange}; there are {methods}, and the names that `status` shows")
        return frozenset().union(*meant.values())

    def check(self, jobs: Iterable[Job] | None = None) -> None:
        """See that the recipe of every run, or of some, fits together, before the first one starts.

        What `infovla train --dry-run` checks: all but what a base must have, which may not be there yet.

        Raises:
            ValueError: which run has which unusable option, or cannot go through all its stages.
            SimulatorNotFoundError: LIBERO, which names the tasks, is not installed.
        """
        for job in self.jobs if jobs is None else jobs:
            recipe = dict(job.recipe)
            if job.base and recipe["base_model"] == _tiny_base(job.base):  # it may have to be trained first
                recipe["base_model"] = "tiny"
            try:
                stream = Stream(*_parsed(json.dumps(recipe)))
                check_recipe(stream)
                check_batches(stream)
            except (ValueError, RunError) as error:
                raise ValueError(f"{job.name}: {error}") from error


def load_benchmark(path: str | os.PathLike[str]) -> Benchmark:
    """Read the YAML of a benchmark.

    Raises:
        FileNotFoundError: no such file.
        BenchmarkError: it cannot be used; the message names the file and the place.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no benchmark at {path}{_others(path)}")
    content = read_yaml(path, error=BenchmarkError, cure="see the example at the top of infovla_peft/benchmark.py")
    try:
        return _plan(path.stem, _mapping(content, "the file"))
    except ValueError as error:
        raise BenchmarkError(f"{path}: {error}") from error


def _others(missing: Path) -> str:
    """Which benchmarks there are, as the end of a message."""
    try:
        folder = recipes_folder() / "configs" / "bench"
    except FileNotFoundError:  # the package was copied without them
        return ""
    if folder.is_relative_to(Path.cwd()):
        folder = folder.relative_to(Path.cwd())
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    near = difflib.get_close_matches(missing.stem, known, n=1)
    hint = f"did you mean {folder / near[0]}.yaml? " if near else ""
    return f"; {hint}in {folder} are {', '.join(known)}"


def _plan(name: str, content: Mapping[str, Any]) -> Benchmark:
    _known(content, ("output_dir", "cores_per_run", "workers", "recipe", "suites", "methods", "runs"), "the file")
    if not isinstance(content.get("output_dir"), str):
        raise ValueError("output_dir must name a folder")
    output_dir = Path(content["output_dir"])
    recipe = _mapping(content.get("recipe") or {}, "recipe")
    suites = _mapping(content.get("suites"), "suites")
    methods = _mapping(content.get("methods") or {}, "methods")
    cores = _count(content.get("cores_per_run", 1), "cores_per_run")
    workers = content.get("workers")
    common: dict[str, dict[str, Any]] = {}
    orders: dict[str, dict[str, list[Any]]] = {}
    check_option_names(recipe, "recipe")
    for suite, entry in suites.items():
        own = dict(_mapping(entry, f"suites.{suite}"))
        orders[suite] = {
            str(order): _list(tasks, f"suites.{suite}.orders.{order}")
            for order, tasks in _mapping(own.pop("orders", None), f"suites.{suite}.orders").items()
        }
        check_option_names(own, f"suites.{suite}")
        common[suite] = {"suite": suite, **recipe, **own}
        if not common[suite].get("demonstrations_source"):
            common[suite].setdefault("demonstrations_folder", str(output_dir / suite / "demonstrations"))
        fixed = OWN_OPTIONS & set(common[suite])
        if fixed:
            raise ValueError(f"suites.{suite}: {', '.join(sorted(fixed))} follow from `runs`; leave them out")
        if "stream" not in common[suite]:
            raise ValueError(f"suites.{suite}: say `stream`, for example B5-5N1, here or in `recipe`")
    for method, own in methods.items():
        # Another suite, model or number of rollouts would be another benchmark, and the base would not fit.
        protocol = (OWN_OPTIONS - {"method"}) | ({item.name for item in fields(StreamConfig)} - _OF_A_METHOD)
        changed = protocol & set(_mapping(own, f"methods.{method}"))
        if changed:
            raise ValueError(f"methods.{method}: {', '.join(sorted(changed))} must be the same for all methods")
        check_option_names(own, f"methods.{method}")
        meant = own.get("method", method)
        if meant not in METHODS:
            unsaid = "" if "method" in own else ", and `method:` does not say which one this row is of"
            raise ValueError(f"methods.{method}: {_no_method(str(meant), METHODS)}{unsaid}")
    jobs: dict[str, Job] = {}
    checked: set[tuple[str, str]] = set()
    for number, entry in enumerate(_list(content.get("runs"), "runs")):
        base_seed = _count(_mapping(entry, f"runs[{number}]").get("base_seed", 0), f"runs[{number}].base_seed", 0)
        for key in _keys(entry, f"runs[{number}]", orders):
            if key.method not in METHODS and key.method not in methods:
                raise ValueError(f"runs[{number}].methods: {_no_method(key.method, [*methods, *METHODS])}")
            options, tasks = common[key.suite], orders[key.suite][key.order]
            if base_seed and options.get("base_model", "tiny") != "tiny":
                raise ValueError(f"runs[{number}].base_seed: a seed is for base_model tiny, which is trained here")
            base = _base_job(output_dir, key.suite, options, tasks, base_seed)
            base = jobs.setdefault(base.name, base)
            run_name = f"{key.suite}/{key.method}_{key.order}_m{key.memory}_s{key.seed}"
            own = {"method": key.method, **methods.get(key.method, {})}
            options = {**options, **own, "eval_workers": cores}
            if options.get("base_model", "tiny") == "tiny":
                options["base_model"] = _tiny_base(base)
            options |= {"tasks": _names(tasks), "seed": key.seed, "memory_trajectories": key.memory}
            options["output_dir"] = str(output_dir / run_name)
            if (key.suite, key.method) not in checked:
                _parsed(json.dumps(options), f"the options of {key.suite}/{key.method}")
                checked.add((key.suite, key.method))
            job = jobs.setdefault(run_name, Job(run_name, output_dir / run_name, options, key, base))
            if job.base_seed != base_seed:
                raise ValueError(
                    f"runs[{number}].base_seed: {run_name} is there with {job.base_seed}; choose another seed"
                )
    return Benchmark(
        name,
        output_dir,
        tuple(_say_which_repeat(jobs.values(), methods)),
        common,
        orders,
        cores,
        None if workers is None else _count(workers, "workers"),
    )


def _no_method(name: str, known: Iterable[str]) -> str:
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"there is no method {name!r:.80}{hint}; there are {', '.join(known)}"


def _say_which_repeat(jobs: Iterable[Job], methods: Container[str]) -> Iterator[Job]:
    """The same jobs, each with what it would repeat. A method with options of its own is no other's."""
    jobs = list(jobs)
    own = {
        (job.key.suite, job.key.method, job.key.seed, job.key.order, job.base_seed): job
        for job in jobs
        if job.key and job.key.method not in methods
    }
    for job in jobs:
        key, same = job.key, None
        if key and key.memory == 0 and key.method in METHODS and key.method not in methods:
            same = own.get((key.suite, without_memory(key.method), key.seed, key.order, job.base_seed))
        yield job if same in (None, job) else replace(job, same_as=same)


def _keys(entry: Mapping[str, Any], where: str, orders: Mapping[str, Mapping[str, Any]]) -> list[RunKey]:
    _known(entry, _ENTRY_KEYS, where)
    suite = str(entry.get("suite"))
    if suite not in orders:
        raise ValueError(f"{where}.suite must be one of {', '.join(orders)}, got {suite!r}")
    methods = [str(method) for method in _list(entry.get("methods"), f"{where}.methods")]
    seeds = [_count(seed, f"{where}.seeds", 0) for seed in _list(entry.get("seeds"), f"{where}.seeds")]
    chosen = [str(order) for order in _list(entry.get("orders", list(orders[suite])), f"{where}.orders")]
    memory = [_count(size, f"{where}.memory", 0) for size in _list(entry.get("memory", [1]), f"{where}.memory")]
    unknown = set(chosen) - set(orders[suite])
    if unknown:
        raise ValueError(
            f"{where}.orders: {suite} has no order {', '.join(sorted(unknown)):.200}; choose among "
            f"{', '.join(orders[suite])}"
        )
    return [
        RunKey(suite, method, seed, order, size)
        for seed in seeds
        for order in chosen
        for size in memory
        for method in methods
    ]


def _base_job(output_dir: Path, suite: str, options: Mapping[str, Any], tasks: Sequence[Any], seed: int) -> Job:
    recipe = {name: value for name, value in options.items() if name not in ADAPTER_OPTIONS}
    recipe |= {"method": "sequential", "seed": seed}  # the base has neither memory nor teacher
    first = parse_stream(str(options["stream"])).base_tasks
    # The order of the later tasks is no matter, but their words are: the tiny base's tokeniser knows them.
    tasks = _names(tasks)
    later = sorted(tasks[first:]) if first else tasks
    content = {**recipe, "tasks": [*tasks[:first], *later]}
    content = {name: value for name, value in content.items() if name not in HARMLESS | {"demonstrations_folder"}}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    folder = output_dir / suite / f"base_{digest}"
    recipe |= {"tasks": content["tasks"], "output_dir": str(folder)}
    return Job(f"{suite}/base_{digest}", folder, recipe)


def _tiny_base(base: Job) -> str:
    """Where a base that is trained here lies."""
    return str(base.folder / "base")


def learn_base(config: StreamConfig, training: InfoVLAConfig) -> None:
    """What all runs on one base share: demonstrations, the base, its column of rollouts."""
    with Stream(config, training) as stream:
        print(stream.plan(), flush=True)
        stream.record()
        stream.learn_base()
        stream.remember(stream.stages[0])
        stream.measure(stream.stages[0])


def take_over_base(job: Job) -> None:
    """Give a run the base column that was measured once: same policy, same start states, same seeds, same result."""
    if job.base is None:
        return
    target = RunFolder(job.folder).stage(0) / "rollouts"
    for cell in sorted((RunFolder(job.base.folder).stage(0) / "rollouts").glob("*.json")):
        if not (target / cell.name).exists():
            result = replace(read_cell(cell, 0), videos=[])  # they lie in the base's folder
            write_cell(target / cell.name, result, target, 0)


def progress(job: Job) -> Progress:
    """How far a run is, or the one that it would repeat, and whether what it has is what the benchmark asks for."""
    job = job.same_as or job
    folder = RunFolder(job.folder)
    planned = 1 if job.is_base else parse_stream(str(job.recipe["stream"])).steps + 1
    try:
        state = folder.state()
        seconds = sum(float(step["seconds"]) for step in state.values())
        stages = sum(name.startswith("measure_") for name in state)
        if job.is_base:
            return Progress(min(stages, 1), 1, seconds)
        if not folder.results.exists():
            return Progress(0, planned, seconds)
        results = Results.load(folder.results)
    except (RunError, ResultsError, OSError, KeyError, TypeError, ValueError) as error:
        return Progress(0, planned, 0.0, str(error))
    changed = changed_keys(results.config, _comparable(job.recipe, results.config), ignore=unimportant(job.recipe))
    problem = None
    if changed:
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changed.items())
        problem = f"{job.folder} was run with another configuration ({listed}); move it away, or undo the change"
    last = {"analyse": "analyse", "push_to_hub": f"push_{planned - 1:02d}"}
    pending = tuple(step for option, step in last.items() if job.recipe.get(option) and step not in state)
    return Progress(min(stages, results.stages, planned), planned, seconds, problem, pending)


def _comparable(recipe: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """What the benchmark asks for; an option that the run did not know yet is taken to have had its default."""
    wanted = resolved_recipe(recipe)
    usual = resolved_recipe({name: recipe[name] for name in ("method",) if name in recipe})
    return {**stored, **{name: value for name, value in wanted.items() if name in stored or value != usual.get(name)}}


def unimportant(recipe: Mapping[str, Any]) -> frozenset[str]:
    """The options in which a run may differ from its recipe and still count."""
    chosen = frozenset({"assets"} if recipe.get("assets", "auto") == "auto" else ())
    return BOOKKEEPING | chosen | unread_options(str(recipe.get("method", InfoVLAConfig.method)))


def resolved_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a recipe, defaults included."""
    return dict(_resolved(json.dumps(recipe)))


@cache
def _resolved(recipe: str) -> dict[str, Any]:
    return resolved_config(*_parsed(recipe))


def _parsed(recipe: str, source: str | None = None) -> tuple[StreamConfig, InfoVLAConfig]:
    # The queue itself needs no GPU: what a recipe wants of one is checked by the run.
    return load_recipe(json.loads(recipe), ["--use_cpu=true", "--bf16=false", "--fp16=false"], source=source)


# --- checks ------------------------------------------------------------------------------------------------------


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} must be a mapping with names as keys, got {value!r:.80}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list of at least one item, got {value!r:.80}")
    return value


def _count(value: Any, where: str, lowest: int = 1) -> int:
    if type(value) is not int or value < lowest:
        raise ValueError(f"{where} must be an integer of at least {lowest}, got {value!r:.80}")
    return value


def _known(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{where} has an unknown key {name!r}; {hint}")


def _names(tasks: Sequence[Any]) -> list[str]:
    return [str(task) for task in tasks]
