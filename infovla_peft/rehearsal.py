"""What one stage replays, and what the frozen teachers make of it, before the stage is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn

from .adapters import adapter_parameters, base_model
from .config import InfoVLAConfig
from .data.chunks import ChunkDataset, FrameTable
from .data.collator import VLACollator
from .data.counterfactual import CounterfactualDataset
from .data.sampling import Augmentation, ReplayMixture, StratifiedBatchSampler, Views
from .memory import Anchors, ReplayMemory
from .methods import METHODS
from .teacher import anchor_spec, compute_anchors, teacher_answers
from .terms import Negatives, Term, make_terms

Part = TypeVar("Part")


class Rehearsal:
    """The replayed frames of a stage: those of the memory, and counterfactual ones, as the method has it.

    Args:
        model: with the adapters that are teachers.
        config: the stage's.
        current: the current task's samples.
        collator: with the frozen normalisation.
        memory: of past tasks.
        previous_adapter, past_tasks, learned_by: see `InfoVLATrainer`.

    Attributes:
        memory: as it is after `prepare`, with anchors; None where nothing of it is replayed.
        remembered: its frames; None likewise.
        counterfactual: frames of the current task under old instructions; None where the method has none.
        tables: both of them, as far as there are any, in the order of the anchors' rows.
        views: of their rows, for which anchors are kept; None where replayed frames are augmented anew.
        terms: of the loss, for replayed samples.
        teachers: past task → adapter, None = the base; empty where nobody is asked.
        anchors: of all tables, after `prepare`; None before.
        negatives: chooses what a batch is contrasted with, after `prepare`; None before.
        answers_all: whether each teacher has learned the tasks it is asked about; see `are_answered`.

    Raises:
        ValueError: a teacher is in training, or its adapter is not loaded; a task in `learned_by` is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        config: InfoVLAConfig,
        current: ChunkDataset,
        collator: VLACollator,
        *,
        memory: ReplayMemory | None = None,
        previous_adapter: str | None = None,
        past_tasks: Mapping[str, str] | None = None,
        learned_by: Mapping[str, str] | None = None,
    ) -> None:
        method = METHODS[config.method]
        self._model, self._config, self._current, self._collator = model, config, current, collator
        self._stages = dict(learned_by or {}) if config.replay_balance == "stage" else None
        self._seed = config.seed if config.data_seed is None else config.data_seed
        if past_tasks is None:
            past_tasks = memory.instructions if memory is not None else {}
        # Of a task that a later adapter learned, the base's features are usable anchors; its actions are not.
        unanswered = set(learned_by or {}) if config.teacher == "base" else set()
        spoken = {words.casefold() for words in current.instructions}
        answered: dict[str, str] = {}
        for name, words in past_tasks.items():  # one answer to the same words, and none beside the demonstrations'
            if name not in unanswered and words.casefold() not in spoken:
                answered[name] = words
                spoken.add(words.casefold())
        replays = method.replay and config.replay_fraction > 0
        self.memory = memory if memory is not None and len(memory) and replays else None
        self.remembered: ChunkDataset | None = None
        if self.memory is not None and self.memory.frames is not None:
            self.remembered = current.like(self.memory.frames)
        self.counterfactual: CounterfactualDataset | None = None
        if answered and method.counterfactual and config.counterfactual_share and config.replay_fraction:
            self.counterfactual = CounterfactualDataset(
                current, answered, frames=config.counterfactual_frames, seed=self._seed
            )
        self.tables: list[FrameTable] = [each for each in (self.remembered, self.counterfactual) if each is not None]
        if self.tables:
            _check_tasks(learned_by, past_tasks, memory)
        self._answered = torch.ones(sum(map(len, self.tables)), dtype=torch.bool)
        if self.remembered is not None and unanswered:
            known = torch.tensor([task not in unanswered for task in self.remembered.tasks])
            self._answered[: len(self.remembered)] = known[torch.from_numpy(self.remembered.task)]
        self.answers_all = bool(self._answered.all())
        self._kind: Literal["actions", "logits"] = (
            "actions" if base_model(model).config.action_head == "l1" else "logits"
        )
        self.terms: list[Term] = list(make_terms(config, self._kind)) if self.tables else []
        self.teachers: dict[str, str | None] = {}
        if self.terms or self.counterfactual is not None:
            tasks = dict.fromkeys(task for table in self.tables for task in table.tasks)
            self.teachers = _teachers(model, config, tasks, previous_adapter, learned_by)
        self.views = self._draw_views() if self.teachers else None
        self.anchors: Anchors | None = None
        self.negatives: Negatives | None = None

    def __bool__(self) -> bool:
        """Whether anything is replayed."""
        return bool(self.tables)

    def are_remembered(self, replayed: Tensor) -> Tensor:
        """(R,) bool, which replayed frames, given as (view, row) (R, 2), are of the memory and not counterfactual."""
        return replayed[:, 1] < len(self.remembered or ())

    def are_answered(self, replayed: Tensor) -> Tensor:
        """(R,) bool, for which replayed frames (view, row) the teacher knows what to do: it has learned their task."""
        return self._answered[replayed[:, 1]]

    @property
    def regresses_answers(self) -> bool:
        """Whether labels of an L1 loss may be a teacher's answers: those of counterfactual frames are."""
        return self.counterfactual is not None and self._kind == "actions"

    def mixture(self) -> ReplayMixture:
        """The data that `sampler` addresses."""
        return ReplayMixture(self._current, self.tables)

    def sampler(self, batch_size: int, batches: int) -> StratifiedBatchSampler:
        """Batches of current and replayed samples for this process.

        Args:
            batch_size: per process.
        """
        config = self._config
        return StratifiedBatchSampler(
            self._current,
            self.remembered,
            batch_size=batch_size,
            replay_fraction=config.replay_fraction,
            batches=batches,
            seed=self._seed,
            processes=config.world_size,
            rank=config.process_index,
            augmentation=self._augmentation,
            counterfactual=self.counterfactual,
            counterfactual_share=config.counterfactual_share,
            views=self.views,
            candidates=config.mir_candidates if METHODS[config.method].retrieves else 1,
            stages=self._stages,
        )

    def prepare(
        self,
        *,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        dtype: str = "no",
    ) -> Anchors | None:
        """Ask the teachers: answers for the counterfactual frames, anchors for all; None where no term needs any.

        A memory task's anchors are those stored with it if they still fit, else they are computed (and stored) now.
        The processes share the work, all get the whole, and the main one stores it. However many tasks are
        remembered, the anchors of one are in memory at a time; the others' are mapped from the disk.

        Args:
            batch_size: of the teachers' forward passes.
            autocast, dtype: see `teacher.compute_anchors`.
        """
        if self.views is None:
            return None
        ask = _TeacherQueries(self._model, self._config, self._collator, self.teachers, batch_size, autocast, dtype)
        folder = str(self._config.output_dir)
        parts: list[Anchors] = []
        first = 0
        for table in self.tables:
            views = self.views.rows(np.arange(first, first + len(table)))
            first += len(table)
            counterfactual = table if isinstance(table, CounterfactualDataset) else None
            # Chunks are among the anchors; action tokens must be known before the features that follow them.
            if counterfactual is not None and not (self.terms and self._kind == "actions"):
                counterfactual.answer(np.concatenate(list(_each_task(table, views, ask.answers))))
            if self.terms:
                stored = self.memory.anchors if self.memory is not None and table is self.remembered else None
                anchors = Anchors.join(list(_each_task(table, views, ask.anchors, stored)), folder)
                parts.append(anchors)
                if counterfactual is not None:
                    if self._kind == "actions":
                        counterfactual.answer(self._collator.normaliser.unnormalise_actions(anchors.output[0].numpy()))
                elif self.memory is not None and (stored is None or stored.spec != anchors.spec):
                    self.memory = self.memory.with_anchors(anchors, save=self._config.should_save)
        if not self.terms:
            return None
        self.anchors, self.negatives = Anchors.join(parts, folder), self._draw_negatives()
        return self.anchors

    def use(self, anchors: Anchors) -> None:
        """Take these as the anchors of all tables, one after another; from now on they lie on the disk.

        However many tasks are remembered, a stage holds no more of them in memory than one batch and the bank.
        """
        self.anchors, self.negatives = anchors.on_disk(str(self._config.output_dir)), self._draw_negatives()

    @property
    def _augmentation(self) -> Augmentation:
        return Augmentation(self._config.image_shift, self._config.proprio_noise)

    def _draw_views(self) -> Views:
        count = self._config.anchor_views
        return Views.join(
            [
                Views.draw(table, count, self._augmentation, self._seed, plain=table is self.remembered)
                for table in self.tables
            ]
        )

    def _draw_negatives(self) -> Negatives:
        table = self.remembered if self.remembered is not None else self.tables[0]
        count = len(self.remembered or ())
        return Negatives(
            torch.from_numpy(table.trajectory[:count]),
            torch.from_numpy(table.frame[:count]),
            bank_size=self._config.anchor_bank,
            window=self._config.near_duplicate_window,
            seed=self._seed,
        )


class _TeacherQueries:
    """How the teachers are asked about the rows of one task."""

    def __init__(
        self,
        model: nn.Module,
        config: InfoVLAConfig,
        collator: VLACollator,
        teachers: Mapping[str, str | None],
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[object]],
        dtype: str,
    ) -> None:
        self._model, self._collator, self._teachers = model, collator, teachers
        self._batch_size, self._autocast, self._folder = batch_size, autocast, str(config.output_dir)
        self._options: dict[str, Any] = {
            "tap_layer": config.tap_layer, "pooling": config.rac_pooling, "temperature": config.temperature,
            "dtype": dtype,
        }  # fmt: skip

    def answers(self, table: FrameTable, rows: NDArray[np.int64], views: Views, task: str) -> NDArray[np.float32]:
        return teacher_answers(
            self._model, table, self._collator, adapter=self._teachers[task], rows=rows, views=views,
            batch_size=self._batch_size,
        )  # fmt: skip

    def anchors(
        self, table: FrameTable, rows: NDArray[np.int64], views: Views, task: str, stored: Anchors | None
    ) -> Anchors:
        options = {**self._options, "adapter": self._teachers[task]}
        if stored is not None and task in stored.spec:
            spec = anchor_spec(self._model, table, self._collator, rows, views, **options)
            if dict(stored.spec[task]) == spec:
                return stored.of_task(task)
        computed = compute_anchors(
            self._model, table, self._collator, rows=rows, views=views, batch_size=self._batch_size,
            autocast=self._autocast, name=task, **options,
        )  # fmt: skip
        return computed.on_disk(self._folder)


def _each_task(table: FrameTable, views: Views, work: Callable[..., Part], *extra: Any) -> Iterator[Part]:
    for number, task in enumerate(table.tasks):  # a task's rows are neighbours
        rows = np.flatnonzero(table.task == number)
        yield work(table, rows, views.rows(rows), task, *extra)


def _check_tasks(
    learned_by: Mapping[str, str] | None, past_tasks: Mapping[str, str], memory: ReplayMemory | None
) -> None:
    """Refuse a task that nobody knows: it is misspelt, and the one that is meant would count as the base's."""
    known = list(dict.fromkeys([*past_tasks, *(memory.tasks if memory is not None else ())]))
    if unknown := [task for task in learned_by or {} if task not in known]:
        raise ValueError(
            f"learned_by names {', '.join(map(repr, unknown))}, which is neither in the memory nor in past_tasks; "
            f"known are {', '.join(map(repr, known))}"
        )


def _teachers(
    model: nn.Module,
    config: InfoVLAConfig,
    tasks: Iterable[str],
    previous: str | None,
    learned_by: Mapping[str, str] | None,
) -> dict[str, str | None]:
    """The adapter that is the teacher of each past task; None = the base."""
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"method={config.method!r} asks a frozen teacher, and this model, all of which is trained, would be its "
            "own: use it with an adapter (adapters.add_adapter), or method='er'"
        )
    known = list(model.peft_config)
    if config.teacher == "auto" and learned_by is None and len(known) > 1:
        raise ValueError(
            f"teacher='auto': which of {known} learned which past task? Say it by learned_by={{task: adapter}}; "
            "learned_by={} if all are the base's"
        )
    learned_by = learned_by or {}
    if config.teacher == "previous":
        if previous is None and len(known) > 1:
            raise ValueError(
                f"teacher='previous': which of {known} is of the stage before? Name it by previous_adapter="
            )
        learned_by = dict.fromkeys(tasks, previous) if previous is not None else {}
    elif config.teacher == "base":
        learned_by = {}
    teachers = {task: learned_by.get(task) for task in tasks}
    for adapter in filter(None, teachers.values()):
        if adapter not in known:
            raise ValueError(
                f"teacher={config.teacher!r} needs the adapter {adapter!r}, found only {known}; "
                "load it first (adapters.load_adapter), or use teacher='base'"
            )
        if any(value.requires_grad for _, value in adapter_parameters(model, adapter)):
            raise ValueError(
                f"teacher={config.teacher!r}: the adapter {adapter!r} is in training, and a teacher must be frozen; "
                f"train a new one (adapters.add_adapter(..., start_from={adapter!r})), or use teacher='base'"
            )
    return teachers
