"""A stream of tasks learned one after another: the steps, their order, and what each leaves in the run folder.

    demonstrations -> base -> for each stage: adapter, memory, rollouts of all tasks seen (a column), report

`Stream` holds one method per step. Each is idempotent: what is finished is not repeated, so the same command continues
a run that was stopped. `run` calls them in order; `recipes/continual.py` spells the same loop out.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from .adapter_files import STATISTICS, AdapterInfo
from .adapters import (
    add_adapter,
    base_model,
    fingerprint,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from .analysis import analyse_run
from .analysis_results import FILE as ANALYSIS
from .checkpoints import STAGING, checkpoints
from .config import InfoVLAConfig, StreamConfig, resolved_config
from .consolidation import Consolidation
from .data.chunks import ChunkDataset
from .data.collator import VLACollator
from .data.demonstrations import CAMERA_COLUMNS, load_demonstrations, recipe_demonstrations
from .data.normalisation import Normaliser
from .data.recorded import MANIFEST as DEMONSTRATIONS
from .data.recorded import DemonstrationManifest
from .data.statistics import statistics_of
from .distributed import whole_state
from .files import atomic_folder, remove_folder
from .hub import load_policy, relative_base
from .inference import Policy
from .integrity import DamagedFileError, read_sealed, sha256, write_sealed
from .loss_log import LossLog
from .measurement import measure_stage
from .memory import MANIFEST as MEMORY
from .memory import ReplayMemory
from .mending import check_memory, column_is_gone, demonstrations_are_gone, memory_is_behind
from .methods import METHODS
from .models.openvla import (
    PROMPT,
    build_tiny_openvla,
    load_openvla,
)
from .plan import Stage, describe_plan, describe_results, plan_stages, step_name, tiny_shape, worker_count
from .policy import chunk_length
from .preflight import check_start
from .progress import show_progress
from .publishing import check_access, push_to_hub
from .remote import HubError
from .results import Results, collect_versions
from .run_folder import HARMLESS, RESTORE, RunError, RunFolder
from .trackers import curves_beside, make_trackers, stage_record
from .trainer import InfoVLATrainer

if TYPE_CHECKING:
    from .simulation import AssetSet, Task

DEMONSTRATION_SEED = 0
"""Demonstrations are data: the same for every seed of a training, so that runs can share them."""


class Stream:
    """One run of a stream. Its methods are the steps; calling a finished one again does nothing.

    Under `accelerate launch --num_processes N` every process calls every method: all train, and share the teachers'
    frames and the rollouts; the main process alone records and writes, and the others wait for it.

    Args:
        config, training: the recipe; `training.output_dir` is the run's folder.

    Attributes:
        run_folder: the run's folder, its finished steps and its lock.
        stages: the base and the steps after it.
    """

    def __init__(self, config: StreamConfig, training: InfoVLAConfig) -> None:
        self.config, self.training = config, training
        self.stages = plan_stages(config)
        self.run_folder = RunFolder(str(training.output_dir), main_process=training.process_index == 0)
        self._repository = training.hub_model_id or ""  # `__enter__` finds the full name

    def __enter__(self) -> Stream:
        """Open the run's folder, and fail now for what would fail later.

        Raises:
            RunError: another configuration or process holds the folder; it cannot be written; something is missing.
        """
        check_start(self)
        if self.training.push_to_hub and self.run_folder.main_process:
            self._repository = check_access(
                self.training.hub_model_id,
                self.run_folder.path,
                private=self.training.hub_private_repo,
                token=self.training.hub_token,
            )
        if self.run_folder.main_process:
            self.run_folder.open(self.resolved_config(), harmless=HARMLESS)
        return self

    def __exit__(self, *_exception: object) -> None:
        self.run_folder.close()

    def resolved_config(self) -> dict[str, Any]:
        """Everything that was chosen or found, as it is kept with the run and with each adapter."""
        found = {"assets": self.assets.name, "processes": self.training.world_size}
        return {**resolved_config(self.config, self.training), **found}

    def plan(self) -> str:
        """What is to be done, in which stages, and about how long it takes; what is finished counts no more."""
        from .simulation import find_assets

        known = vars(self).get("assets")  # before the run has begun, nothing is downloaded or built for its plan
        assets = known or find_assets(self.config.assets, self.config.assets_folder, fetch=False)
        state = self.run_folder.state()
        return describe_plan(self.config, self.training, self.stages, assets, state, self.demonstrations_folder)

    # --- what the steps work on --------------------------------------------------------------------------------------

    @property
    def is_tiny(self) -> bool:
        """Whether the base is built and trained here."""
        return self.config.base_model == "tiny"

    @property
    def tasks(self) -> list[Task]:
        """All tasks of the stream in the order of learning."""
        return [task for stage in self.stages for task in stage.tasks]

    @property
    def base(self) -> str:
        """Folder or Hub id of the base checkpoint."""
        return str(self.run_folder.base) if self.is_tiny else self.config.base_model

    @cached_property
    def open_loop_steps(self) -> int:
        """Actions executed between two looks: as many as were asked for, and the base predicts at a time."""
        from .models.openvla.checkpoint import read_config

        return min(self.config.open_loop_steps, chunk_length(read_config(self.base, {})[0]))

    @property
    def demonstrations_folder(self) -> Path:
        """Where scripted demonstrations are recorded."""
        return Path(self.config.demonstrations_folder or self.run_folder / "demonstrations")

    @property
    def _demonstrations(self) -> Path:
        """What must be there once the demonstrations are: their folder; of the Hub, nothing of ours."""
        source = self.config.demonstrations_source
        if source is None:
            return self.demonstrations_folder
        return Path(source) if Path(source).exists() else self.run_folder.path

    @cached_property
    def assets(self) -> AssetSet:
        """The asset set of the whole run: what was found at its start."""
        from .simulation import find_assets

        return find_assets(self.config.assets, self.config.assets_folder)

    def demonstrations(self, tasks: Sequence[Task]) -> datasets.Dataset:
        """Frames of the demonstrations of some tasks."""
        source, options = recipe_demonstrations(vars(self.config), self.demonstrations_folder)
        names = [task.name for task in tasks]
        return load_demonstrations(source, names, episodes=self.config.demonstrations, **options)

    def load_base(self) -> tuple[Any, Any, Normaliser]:
        """The base model, its processor and the frozen statistics.

        Raises:
            RunError: a tiny base is not trained yet.
            ValueError: the base reads another number of images than `cameras` names.
        """
        if self.is_tiny:
            self._need("base", self.run_folder.base)
        model, processor = load_openvla(
            self.base, quantization=self.config.quantization, images=len(self.config.cameras)
        )
        key, bounds = self.config.unnorm_key or self.config.suite, model.config.action_normalization
        return model, processor, Normaliser(self._statistics(model), key, bounds=bounds)

    def collator(self, model: Any, processor: Any, normaliser: Normaliser) -> VLACollator:
        """What turns samples into batches for a model."""
        return VLACollator(processor, normaliser, model.config, crop=self.config.center_crop)

    def samples(self, tasks: Sequence[Task], model: Any, collator: VLACollator) -> ChunkDataset:
        """Training samples of some tasks, prepared for a model."""
        return ChunkDataset(
            self.demonstrations(tasks),
            collator.pipeline,
            chunk=chunk_length(model.config),
            cameras=[CAMERA_COLUMNS[camera] for camera in self.config.cameras],
            cache_images=self.training.cache_images,
        )

    def stage_training(self, stage: Stage) -> InfoVLAConfig:
        """The trainer's configuration of one stage: its folder and its steps."""
        training = copy.deepcopy(self.training)
        training.output_dir = str(self.run_folder.stage(stage.index))
        # `publish` pushes whole stages; the Trainer would push checkpoints, and pickle the token beside them.
        training.push_to_hub, training.hub_token = False, None
        training.max_steps = self.config.stage_steps
        training.save_total_limit = training.save_total_limit or 1
        if stage.index == 0:
            training.max_steps = self.config.base_steps
            training.learning_rate = self.config.base_learning_rate
            training.per_device_train_batch_size = self.config.base_batch_size
            training.cache_vision_features = False  # nothing is replayed, and the vision tower is trained
        return training

    def callbacks(self, stage: Stage) -> list[Any]:
        """log.jsonl of a stage, for the report's curves."""
        return [LossLog(self.run_folder.stage(stage.index) / "log.jsonl", stage.index)]

    # --- the steps ---------------------------------------------------------------------------------------------------

    def record(self) -> None:
        """Record the scripted demonstrations of every task; of those that exist already, see that all are there."""
        work = self._record if self.config.demonstrations_source is None else self._find_demonstrations
        self.run_folder.once("demonstrations", work, products=[self._demonstrations], gone=self._recordings_are_gone)

    def _recordings_are_gone(self) -> bool:
        """Whether recorded demonstrations were deleted that a step will still ask for."""
        steps = [step_name("remember", stage) for stage in self.stages]
        needed = not set(steps) <= set(self.run_folder.state()) or not self.run_folder.memory.exists()
        scripted = self.config.demonstrations_source is None
        return needed and scripted and demonstrations_are_gone(self.demonstrations_folder)

    def _find_demonstrations(self) -> dict[str, Any]:
        source, options = recipe_demonstrations(vars(self.config), self.demonstrations_folder)
        self._check_recorded_as_here(Path(str(source)))
        names = [task.name for task in self.tasks]
        found = load_demonstrations(source, names, self.config.demonstrations, streaming=True, **options)
        seen = [CAMERA_COLUMNS[camera] for camera in self.config.cameras]
        if missing := [column for column in seen if column not in found.features]:
            raise RunError(
                f"{source} has no {', '.join(missing)}, which `cameras` wants; name its column by "
                "demonstrations_columns (image=..., wrist_image=...), or choose other cameras"
            )
        return {"folder": Path(str(self.config.demonstrations_source)).is_dir()}

    def _check_recorded_as_here(self, source: Path) -> None:
        """What this package has recorded says with which assets, which are never mixed within a stream."""
        if not (source / DEMONSTRATIONS).is_file():
            return
        there = DemonstrationManifest.load(source).settings
        here = {"assets": self.assets.name, "renderer": self.config.renderer}
        pairs = [(name, getattr(there, name), wanted) for name, wanted in here.items()]
        differing = [f"{name}: {found} there, {wanted} here" for name, found, wanted in pairs if found != wanted]
        if differing:
            raise RunError(
                f"{source} was recorded with other settings than this stream is rolled out with "
                f"({'; '.join(differing)}); set them as there, or record anew"
            )

    def _record(self) -> None:
        from .data.recording import record_demonstrations

        record_demonstrations(
            self.tasks,
            self.demonstrations_folder,
            episodes=self.config.demonstrations,
            assets=self.assets,
            image_size=self.config.image_size,
            cameras=self.config.cameras,
            renderer=self.config.renderer,
            noise=self.config.demonstration_noise,
            seed=DEMONSTRATION_SEED,
            num_workers=worker_count(self.config.demonstration_workers),
        )

    def learn_base(self) -> None:
        """Build a tiny base and train all its parameters on the base tasks; a checkpoint is the base as it is."""
        if self.is_tiny:
            self.run_folder.once(
                "base", self._learn_base, products=[self.run_folder.base], sealed=[self.run_folder.base], everyone=True
            )
            self._drop_checkpoints(self.stages[0])

    def _learn_base(self) -> None:
        self._need("demonstrations", self._demonstrations)
        stage, config = self.stages[0], self.config
        frames = self.demonstrations(stage.tasks)
        model, processor = build_tiny_openvla(
            instructions=[task.instruction for task in self.tasks],
            **tiny_shape(config),
            num_images=len(config.cameras),
            norm_stats={config.suite: statistics_of(frames)},
            seed=self.training.seed,
        )
        collator = self.collator(model, processor, Normaliser(model.norm_stats, config.suite))
        samples = self.samples(stage.tasks, model, collator)
        with curves_beside(self.run_folder.path, stage.name, self.training.project):
            trainer = InfoVLATrainer(
                model, self.stage_training(stage), samples, collator, callbacks=self.callbacks(stage)
            )
            show_progress(trainer, "base")
            trainer.train(resume_from_checkpoint=True)
        weights = whole_state(model)
        if self.run_folder.main_process:
            with atomic_folder(self.run_folder.base) as folder:
                model.save_pretrained(folder, state_dict=weights)
                processor.save_pretrained(folder)

    def learn(self, stage: Stage, train: Callable[[Stream, Stage], None] | None = None) -> None:
        """Train the adapter of one stage.

        Args:
            train: trains and saves it (`save_adapter`), from its last checkpoint if there is one; `train_adapter`
                if None.

        Raises:
            RunError: the stage before it is not finished.
        """
        folder = self.run_folder.adapter(stage.name)

        def work() -> None:
            with curves_beside(self.run_folder.path, stage.name, self.training.project):
                (train or train_adapter)(self, stage)

        step = step_name("learn", stage)
        self.run_folder.once(step, work, products=[folder], sealed=[folder], everyone=True)
        self._drop_checkpoints(stage)  # not before the step is entered: a kill in between would repeat the training
        if METHODS[self.training.method].policy == "merged":
            merged = self.run_folder.merged(stage.name)
            self.run_folder.once(
                step_name("merge", stage), lambda: self._merge(stage), products=[merged], sealed=[merged]
            )

    def _merge(self, stage: Stage) -> None:
        """Write all adapters so far as one."""
        model, _, normaliser = self.load_base()
        earlier = self.stages[1 : stage.index + 1]
        for each in earlier:
            folder = self.run_folder.adapter(each.name)
            self._need(step_name("learn", each), folder)
            model, info = load_adapter(model, folder, each.name)
        name = f"merged_{stage.index:02d}"
        model = merge_adapters(
            model,
            [each.name for each in earlier],
            name,
            weight=self.training.merge_weight,
            rank=self.training.merge_rank,
        )
        save_adapter(model, name, self.run_folder.merged(stage.name), info, normaliser.as_statistics())

    def load_previous(self, stage: Stage, model: Any) -> tuple[Any, str | None]:
        """The base `model` with the adapter of the stage before, and its name; the base alone and None in stage 1.

        Where each task's teacher is the adapter that learned it, the other earlier adapters are loaded as well.

        Raises:
            RunError: something that the stage builds on is not finished or not there.
        """
        before = self.stages[stage.index - 1]
        self._need(step_name("remember", before), self.run_folder.memory)
        check_memory(self.run_folder, before.index)
        every = METHODS[self.training.method].has_teacher and self.training.teacher == "auto"
        for earlier in self.stages[1 : stage.index] if every else [before] if before.index else []:
            folder = self.run_folder.adapter(earlier.name)
            self._need(step_name("learn", earlier), folder)
            model, _ = load_adapter(model, folder, earlier.name)
        return model, before.name if before.index else None

    def past(self, stage: Stage, model: Any, collator: VLACollator) -> dict[str, Any]:
        """What the trainer of a stage is told of the stages before: tasks, who learned them, what they depend on."""
        earlier = self.stages[: stage.index]
        return {
            "consolidation": self._consolidate(stage, model, collator),
            "previous_adapter": earlier[-1].name if len(earlier) > 1 else None,
            "past_tasks": {task.name: task.instruction for each in earlier for task in each.tasks},
            "learned_by": {task.name: each.name for each in earlier[1:] for task in each.tasks},
        }

    def _consolidate(self, stage: Stage, model: Any, collator: VLACollator) -> Consolidation | None:
        """EWC's Fisher information of the tasks before a stage, at the adapter that it starts from."""
        before = self.stages[stage.index - 1]
        if not METHODS[self.training.method].consolidates or not before.tasks:
            return None
        file, earlier = (self.run_folder.stage(index) / "fisher.safetensors" for index in (stage.index, before.index))
        if file.exists():
            try:
                return Consolidation.load(file, stage=stage.index)
            except DamagedFileError as error:
                raise RunError(f"{error}; delete it and give the same command again, which measures it") from error
        if self.config.quantization == "none":  # a quantised one is there already
            model.to(self.training.device)
        found = Consolidation.measure(
            model,
            stage.name,
            self.samples(before.tasks, model, collator),
            collator,
            samples=self.training.ewc_samples * len(before.tasks),
            seed=self.training.seed,
            tasks=len(before.tasks),
            before=self._consolidated(before, earlier),
            decay=self.training.ewc_decay,
        )
        if self.run_folder.main_process:
            found.save(file, stage=stage.index)
        return found

    def _consolidated(self, stage: Stage, file: Path) -> Consolidation | None:
        """The Fisher information with which a finished stage was trained; None if no tasks came before it."""
        if not stage.index or not self.stages[stage.index - 1].tasks:
            return None
        try:
            return Consolidation.load(file, stage=stage.index)
        except (FileNotFoundError, DamagedFileError) as error:
            raise RunError(f"{error}; {RESTORE}") from error

    def save_adapter(self, model: Any, stage: Stage, normaliser: Normaliser) -> None:
        """Write the folder of a stage's adapter. All processes call it."""
        folder = self.run_folder.adapter(stage.name)
        base = base_model(model).config
        info = AdapterInfo(
            base_model=relative_base(self.base, folder),
            base_revision=None if self.is_tiny else getattr(base, "_commit_hash", None),
            base_fingerprint=fingerprint(model),
            unnorm_key=normaliser.key,
            task=", ".join(task.name for task in stage.tasks),
            instruction=", ".join(task.instruction for task in stage.tasks),
            suite=self.config.suite,
            stage=stage.index,
            seen=[task.name for task in self.seen(stage)],
            tasks=[
                {"name": task.name, "instruction": task.instruction, "stage": each.index}
                for each in self.stages[: stage.index + 1]
                for task in each.tasks
            ],
            stream=self.config.stream,
            cameras=list(self.config.cameras),
            statistics={"file": STATISTICS, "key": normaliser.key},
            prompt=PROMPT,
            image_pipeline={
                "rendered_size": self.config.image_size,
                "input_sizes": list(base.image_sizes),
                "resize": base.image_resize_strategy,
                "center_crop": self.config.center_crop,
            },
            taps={"layer": self.training.tap_layer, "pooling": self.training.rac_pooling or "action"},
            versions=collect_versions(),
            training=self.resolved_config(),
            quantization=self.config.quantization,
        )
        save_adapter(model, stage.name, folder, info, normaliser.as_statistics(), write=self.run_folder.main_process)

    def memory(self) -> ReplayMemory:
        """What is kept of the tasks so far."""
        return ReplayMemory.load(self.run_folder.memory)

    def remember(self, stage: Stage) -> None:
        """Put trajectories of a stage's tasks into the memory."""
        memory = self.run_folder.memory
        self.run_folder.once(
            step_name("remember", stage),
            lambda: self._remember(stage),
            products=[memory],
            gone=lambda: memory_is_behind(memory, stage.index),
        )

    def _remember(self, stage: Stage) -> dict[str, str]:
        if stage.index:
            check_memory(self.run_folder, stage.index - 1, stage.index)
        memory = ReplayMemory() if stage.index == 0 else self.memory()
        new = [task for task in stage.tasks if task.name not in memory.tasks]  # all, unless a kill came just here
        keeps_all = METHODS[self.training.method].keeps_all
        trajectories = self.config.demonstrations if keeps_all else self.config.memory_trajectories
        if new and trajectories:
            memory = memory.add(self.demonstrations(new), trajectories=trajectories, seed=self.training.seed)
        memory.save(self.run_folder.memory, stage=stage.index)
        return {"memory": sha256(self.run_folder.memory / MEMORY)}  # which of all runs' it is, see `check_memory`

    def seen(self, stage: Stage) -> list[Task]:
        """The tasks learned up to and including a stage."""
        return [task for earlier in self.stages[: stage.index + 1] for task in earlier.tasks]

    def measure(self, stage: Stage) -> None:
        """Roll the policy of a stage out on every task seen so far; write its column of the matrix and the report.

        Each task's result is stored as it comes, so that a stopped evaluation continues with the next task.
        """
        results = self.run_folder.results
        self.run_folder.once(
            step_name("measure", stage),
            lambda: self._measure(stage),
            products=[results],
            sealed=[results, results.with_name("success.csv")],
            everyone=True,
            gone=lambda: column_is_gone(self.run_folder, stage.index, [task.name for task in self.seen(stage)]),
        )

    def _measure(self, stage: Stage) -> None:
        measure_stage(self, stage)
        if not self.run_folder.main_process:
            return
        for tracker in make_trackers(self.training, self.run_folder.path):
            results = Results.load(self.run_folder.results)
            tracker.log(stage_record(results, stage.index, self.run_folder.path))

    def publish(self, stage: Stage) -> None:
        """Push what is finished to the Hub as one commit, if the recipe says `push_to_hub`.

        A push that fails stops no training: the next stage's push carries everything, and so does the same command
        later. After the last stage it is an error. That push comes after `analyse`, whose figures it carries; where
        the analysis was asked for later, the same command pushes again.

        Raises:
            HubError: the last push failed.
        """
        if not self.training.push_to_hub or stage.index == 0:
            return
        step, last = step_name("push", stage), stage is self.stages[-1]

        def push() -> dict[str, Any]:
            analysed = {"analysed": self.run_folder.done("analyse")} if last else {}
            try:
                done = push_to_hub(
                    self.run_folder.path,
                    self._repository,
                    private=self.training.hub_private_repo,
                    revision=self.training.hub_revision,
                    token=self.training.hub_token,
                )
            except (HubError, FileNotFoundError) as error:
                if last:
                    raise
                print(f"stage {stage.index} is not pushed yet ({error}); the next stage's push carries it", flush=True)
                return {"failed": str(error)}
            print(f"pushed: {done.url}", flush=True)
            return {"commit": done.commit, **analysed}

        def lacks_figures() -> bool:
            steps = self.run_folder.state()
            return "analyse" in steps and steps.get(step, {}).get("analysed") is False

        self.run_folder.once(step, push, gone=lacks_figures)

    def analyse(self) -> None:
        """Look at what every stage has kept of every task (`analysis.analyse_run`), if the recipe asks for it."""
        if self.config.analyse:
            self.run_folder.once("analyse", self._analyse, products=[self.run_folder / ANALYSIS])

    def _analyse(self) -> None:
        analyse_run(
            self.run_folder.path,
            policies=lambda stage: self.policy(self.stages[stage]),
        )

    def policy(self, stage: Stage) -> Policy:
        """The policy after a stage, loaded as a user would load it; of `merge`, with all adapters so far in one."""
        device = self.training.device
        if stage.index:
            merges = METHODS[self.training.method].policy == "merged"
            folder = (self.run_folder.merged if merges else self.run_folder.adapter)(stage.name)
            self._need(step_name("merge" if merges else "learn", stage), folder)
            return load_policy(folder, base=self.base, device=device)
        model, processor, normaliser = self.load_base()
        model.config.norm_stats = normaliser.as_statistics()
        recipe = self.resolved_config()
        return Policy(model.to(device), processor, normaliser, cameras=self.config.cameras, recipe=recipe)

    def run(self) -> None:
        """All steps in order, from wherever the run was stopped."""
        self.record()
        self.learn_base()
        for stage in self.stages:
            if stage.index:
                self.learn(stage)
            self.remember(stage)
            self.measure(stage)
            if stage is self.stages[-1]:
                self.analyse()
            self.publish(stage)

    def summary(self) -> str:
        """The success matrix and the metrics of what is measured, as text, and where the report is."""
        report = self.run_folder / "report" / "index.html"
        return f"{describe_results(Results.load(self.run_folder.results))}\nreport: {report}"

    # --- details -----------------------------------------------------------------------------------------------------

    def _statistics(self, model: Any) -> dict[str, Any]:
        """Those of the base; where it has none of this suite, those of the tasks learned first, kept in the run."""
        key = self.config.unnorm_key or self.config.suite
        known: dict[str, Any] = model.norm_stats
        if self.config.unnorm_key or {key, f"{key}_no_noops"} & set(known):
            return known
        file = self.run_folder / "dataset_statistics.json"
        if not file.exists():
            first = next(stage for stage in self.stages if stage.tasks)
            statistics = {key: statistics_of(self.demonstrations(first.tasks))}
            if not self.run_folder.main_process:
                return statistics
            write_sealed(file, {"format_version": 2, "statistics": statistics}, {})
        content = read_sealed(file, newest=2)
        loaded: dict[str, Any] = content.get("statistics", content)  # as the first format had them
        return loaded

    def _need(self, step: str, product: Path) -> None:
        if not self.run_folder.done(step):
            raise RunError(
                f"{self.run_folder.path}: {step!r} is not finished, and the next step builds on it; "
                "run the whole recipe with this --output_dir, it does what is missing"
            )
        self.run_folder.require([product], step)
        self.run_folder.check(product)

    def _drop_checkpoints(self, stage: Stage) -> None:
        if self.run_folder.main_process:
            folder = self.run_folder.stage(stage.index)
            for path in checkpoints(folder):
                remove_folder(path)
            shutil.rmtree(folder / STAGING, ignore_errors=True)


def train_adapter(stream: Stream, stage: Stage) -> None:
    """Train the adapter of one stage on its tasks and the memory, and save it. Spelled out in recipes/continual.py."""
    model, processor, normaliser = stream.load_base()
    model, previous = stream.load_previous(stage, model)
    start_from = previous if stream.training.adapter_init == "continue" else None
    model = add_adapter(model, stage.name, stream.training, start_from=start_from)
    collator = stream.collator(model, processor, normaliser)
    trainer = InfoVLATrainer(
        model,
        stream.stage_training(stage),
        stream.samples(stage.tasks, model, collator),
        collator,
        memory=stream.memory(),
        callbacks=stream.callbacks(stage),
        **stream.past(stage, model, collator),
    )
    show_progress(trainer, f"stage {stage.index}")
    trainer.train(resume_from_checkpoint=True)
    stream.save_adapter(model, stage, normaliser)
