"""The adapters that lie in one place: which there are, which one has learned a task, and all of them on one base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from .adapter_files import INFO, PEFT_CONFIG, STATISTICS, WEIGHTS, AdapterError, AdapterInfo, check_adapter, read_info
from .adapters import BASE, active_adapter, deactivate, fingerprint, load_adapter, switch
from .foreign import load_reference_adapter, read_reference_info
from .methods import METHODS
from .task_names import instruction_of, same_task

FOLDERS = ("merged/*", "adapters/*", "stage_*")
"""Where adapters lie: of a run that merges them, of another run, of a published one. The first that is there."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder and what is said of it there.

    Attributes:
        folder: holds `infovla.json`, or, of a plain PEFT adapter, `adapter_config.json` alone.
        info: what it says.
        reference: a plain PEFT adapter, for example of OpenVLA's own recipe: nothing says which base it needs.
        twin: a second folder with the same adapter, which is checked with it: the root of a published run, which
            others read.
    """

    folder: Path
    info: AdapterInfo
    reference: bool = False
    twin: Path | None = None

    @property
    def learned(self) -> list[str]:
        """Names of the tasks it was trained on."""
        return self.info.task.split(", ") if self.info.task else []

    @property
    def name(self) -> str:
        """Under which it is on the model."""
        return f"stage_{self.info.stage:02d}"


def find_adapters(folder: Path) -> list[StoredAdapter]:
    """The adapters of a folder, by stage: those below it, or the folder itself.

    Raises:
        AdapterError: a description is damaged, missing where those of other stages are there, or at the root of a
            published run another than in its folder.
    """
    if (folder / PEFT_CONFIG).is_file() and not (folder / INFO).is_file():
        below = [*folder.glob(f"*/{INFO}"), *folder.glob(f"stage_*/{PEFT_CONFIG}")]
        if below:  # taken for a plain adapter, it would be loaded without a single check
            raise AdapterError(
                f"{folder / INFO} is missing, while {below[0].parent.name}/ is there: a part of a published run. "
                "Copy the whole folder again, or push the run again"
            )
        return [StoredAdapter(folder, read_reference_info(folder), reference=True)]
    pattern = next((each for each in FOLDERS if any(folder.glob(f"{each}/{INFO}"))), None)
    for file in _parts(folder, [pattern] if pattern else FOLDERS):
        if not (file.parent / INFO).is_file():
            raise AdapterError(
                f"{file.parent / INFO} is missing: copy the whole folder again (a plain PEFT adapter is loaded from "
                "its own folder)"
            )
    below = list(folder.glob(f"{pattern}/{INFO}")) if pattern else []
    found = [StoredAdapter(file.parent, read_info(file.parent)) for file in below]
    if (folder / INFO).is_file():
        root = StoredAdapter(folder, read_info(folder))  # of a published run: its last stage once more
        twins = [adapter for adapter in found if adapter.info.stage == root.info.stage]
        for adapter in twins:
            if _said(adapter.info) != _said(root.info):
                raise AdapterError(
                    f"{folder / INFO} is of another adapter than {adapter.folder.name}/{INFO}: copy the whole folder "
                    "again, or push the run again"
                )
        found = [replace(each, twin=folder) if each in twins else each for each in found]
        found += [] if twins else [root]
    return sorted(found, key=lambda adapter: adapter.info.stage)


def _parts(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files that only an adapter's folder has."""
    return [file for each in patterns for name in (PEFT_CONFIG, WEIGHTS) for file in folder.glob(f"{each}/{name}")]


def _said(info: AdapterInfo) -> tuple[Any, ...]:
    """What the two descriptions of one adapter share; the way to the base is another from each."""
    sums = {name: value for name, value in info.sha256.items() if name != PEFT_CONFIG}
    return info.task, info.unnorm_key, info.base_fingerprint, info.base_revision, info.cameras, sums


def choose(
    adapters: Sequence[StoredAdapter], folder: Path, where: str, task: str | None, stage: int | None
) -> tuple[StoredAdapter | None, str | None]:
    """The adapter that learned `task` (of `stage`, if given; the latest without both) and the task's instruction.

    Args:
        folder: where the adapters lie.
        where: its name, for messages.

    Returns:
        None for the base: of stage 0, or where a task was learned by the base.

    Raises:
        ValueError: no such task or stage; the message lists what there is.
    """
    given: Any = stage
    if isinstance(given, bool) or not isinstance(given, (Integral, type(None))):
        raise ValueError(f"stage must be an integer, got {stage!r:.80}")
    # An adapter saved without a stage says 0, which asks for the base all the same.
    candidates = [adapter for adapter in adapters if stage is None or adapter.info.stage == stage != 0]
    if stage != 0 and not candidates and (stage is not None or task is not None):
        raise ValueError(f"{where} has no adapter of stage {stage or 1}; it has: {listed(adapters)}")
    if task is None:
        alone = len(adapters) == 1 and adapters[0].folder == folder and len(adapters[0].learned) <= 1
        return (candidates[-1] if candidates else None), (adapters[0].info.instruction or None if alone else None)
    if len(adapters) == 1 and adapters[0].reference:  # neither it nor its base says what it has learned
        return (candidates[0] if candidates else None), instruction_of(task)
    for adapter in candidates:
        for name in adapter.learned if stage is None else adapter.info.seen:
            if same_task(task, name):
                return adapter, instruction_of(name)
    for name in _of_the_base(adapters[0].info) if stage in (None, 0) and adapters else []:
        if same_task(task, name):
            return None, instruction_of(name)
    later = [adapter for adapter in adapters if any(same_task(task, name) for name in adapter.info.seen)]
    hint = f", but stage={later[0].info.stage} came after it and can be asked for" if later and stage is None else ""
    raise ValueError(f"{where} has learned no task {task!r}{hint}; it has: {listed(adapters)}")


def tasks_after(adapters: Sequence[StoredAdapter], stage: int | None = None) -> list[str]:
    """Names of the tasks learned by the end of a stage (0 is the base, None the last one), as far as they say.

    Where each task has an adapter of its own (`single_task`), a stage that is named has its tasks alone.
    """
    if not adapters or stage == 0:
        return _of_the_base(adapters[0].info) if adapters else []
    found = [each for each in adapters if stage in (None, each.info.stage)]
    if not found:
        raise ValueError(f"there is no adapter of stage {stage}; there are: {listed(adapters)}")
    method = METHODS.get(str(found[-1].info.training.get("method")))
    if method is None or method.policy != "own":
        return list(found[-1].info.seen)
    return known_tasks(adapters) if stage is None else found[-1].learned


def known_tasks(adapters: Sequence[StoredAdapter]) -> list[str]:
    """Names of the tasks that one of these adapters or their base was trained on, in that order."""
    if not adapters:
        return []
    known = {*_of_the_base(adapters[0].info), *(task for each in adapters for task in each.learned)}
    return [task for task in adapters[-1].info.seen if task in known]


def _of_the_base(info: AdapterInfo) -> list[str]:
    """Names of the tasks that the base under an adapter had learned, as far as it says."""
    if info.tasks:
        return [str(task.get("name")) for task in info.tasks if task.get("stage") == 0]
    # An earlier format: of a later stage, those of the stages before it would be among them.
    return [name for name in info.seen if name not in info.task.split(", ")] if info.stage == 1 else []


def listed(adapters: Sequence[StoredAdapter]) -> str:
    """Stages and tasks, for messages."""
    return (
        "; ".join(f"stage {adapter.info.stage}, {adapter.info.task or 'a plain PEFT adapter'}" for adapter in adapters)
        or "none"
    )


def _check_twin(folder: Path, twin: Path) -> None:
    """Check the files of an adapter's second folder, but for those that are the very files of the first."""
    names = (WEIGHTS, PEFT_CONFIG, STATISTICS)
    pairs = [(twin / name, folder / name) for name in names]
    if not all(one.exists() and other.exists() and one.samefile(other) for one, other in pairs):
        check_adapter(twin)


class AdapterLibrary:
    """Adapters that share one base, each read when it is first needed.

    Args:
        adapters: those of one place.
        folder, where: the place, and its name, for messages.
        fetch: makes sure that the files of one are on this machine.
        base_fingerprint: of the base that they go onto, see `adapters.fingerprint`.
        held: of the model that it was loaded as, where that shows other values than its files.
    """

    def __init__(
        self,
        adapters: Sequence[StoredAdapter],
        folder: Path,
        where: str,
        fetch: Callable[[StoredAdapter], Any],
        base_fingerprint: dict[str, str],
        held: dict[str, str] | None = None,
    ) -> None:
        self.adapters, self.folder, self.where = list(adapters), folder, where
        self._fetch, self._fingerprint, self._held = fetch, base_fingerprint, held or base_fingerprint
        self._has_loaded = False

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks that are known here, in the order in which they were learned."""
        return known_tasks(self.adapters)

    def tasks_after(self, stage: int | None = None) -> list[str]:
        """See `tasks_after`."""
        return tasks_after(self.adapters, stage)

    def choose(self, task: str | None = None, stage: int | None = None) -> tuple[StoredAdapter | None, str | None]:
        """See `choose`."""
        return choose(self.adapters, self.folder, self.where, task, stage)

    def check_model(self, model: nn.Module) -> None:
        """See that a model is still what its adapters go onto, and its base still the base.

        PEFT's `merge_and_unload` leaves one adapter in the weights of the base, and says so nowhere.

        Raises:
            AdapterError: it was called on this model, or its `unload` without taking what that returns.
        """
        if isinstance(model, PeftModel):
            merged = not any(isinstance(module, LoraLayer) for module in model.modules())
        else:  # never adapted, or no more
            merged = self._has_loaded and fingerprint(model) != self._held
        if merged:
            raise AdapterError(
                f"the model no longer holds the base of {self.where}, or no adapters: one was merged into its weights,"
                " or PEFT has unloaded them; load the policy again (load_policy) to use another, or the base alone"
            )

    def load(self, model: Any, adapter: StoredAdapter) -> Any:
        """`model` with this adapter among its own, which keep their state.

        Raises:
            AdapterError: it does not fit the base, was damaged, or was trained with other statistics, cameras or
                prompt than the first one; see `check_model`.
        """
        self.check_model(model)
        if adapter.name in getattr(model, "peft_config", {}):
            return model
        first = next((each.info for each in self.adapters if each.name in getattr(model, "peft_config", {})), None)
        if first is not None:
            differing = [
                name
                for name in ("unnorm_key", "cameras", "prompt")
                if getattr(first, name) != getattr(adapter.info, name)
            ]
            stored = [(each.sha256.get(STATISTICS), each.image_pipeline) for each in (first, adapter.info)]
            for name, one, other in zip(("statistics", "image pipeline"), *stored, strict=True):
                if one and other and one != other:  # earlier formats do not say
                    differing.append(name)
            if differing:
                raise AdapterError(
                    f"{adapter.folder} has another {' and '.join(differing)} than the adapters in use; load it by a "
                    "load_policy of its own"
                )
        self._fetch(adapter)
        if adapter.twin is not None:
            _check_twin(adapter.folder, adapter.twin)
        if adapter.reference:
            loaded = load_reference_adapter(model, adapter.folder, adapter.name)
        else:
            loaded, _ = load_adapter(model, adapter.folder, adapter.name, base_fingerprint=self._fingerprint)
        self._has_loaded = True
        return loaded

    def switch(self, model: Any, adapter: StoredAdapter | None) -> Any:
        """`model`, running with this adapter, or as the base alone."""
        if adapter is None:
            self.check_model(model)
            deactivate(model)
            return model
        model = self.load(model, adapter)
        switch(model, adapter.name)
        return model

    def mixed(self, tasks: Sequence[str]) -> tuple[list[StoredAdapter], list[str], list[str]]:
        """What a batch of these tasks needs: the adapters; and of each task its adapter's name and instruction."""
        chosen = [self.choose(task) for task in tasks]
        names = [BASE if adapter is None else adapter.name for adapter, _ in chosen]
        instructions = [instruction or task for (_, instruction), task in zip(chosen, tasks, strict=True)]
        return [adapter for adapter, _ in chosen if adapter is not None], names, instructions

    def load_inactive(self, model: Any, adapter: StoredAdapter) -> Any:
        """`load`, but the model runs with what it ran with before."""
        before = active_adapter(model)
        loaded = self.load(model, adapter)
        if active_adapter(loaded) != before:  # reading an adapter has activated it
            switch(loaded, before) if before else deactivate(loaded)
        return loaded
