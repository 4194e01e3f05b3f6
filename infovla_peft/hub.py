"""Policies from where they lie: an adapter, a run, a base checkpoint; a local folder or a repository of the Hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters import INFO, STATISTICS, AdapterError, AdapterInfo, base_model, load_adapter, read_info
from .data.normalisation import Normaliser
from .inference import Policy
from .models.openvla import load_openvla

AGENT_VIEW, WRIST_VIEW = "agentview", "robot0_eye_in_hand"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's folder and what its infovla.json says."""

    folder: Path
    info: AdapterInfo

    @property
    def learned(self) -> list[str]:
        """Names of the tasks it was trained on."""
        return self.info.task.split(", ")


def load_policy(
    path_or_repo: str | os.PathLike[str],
    *,
    task: str | None = None,
    stage: int | None = None,
    base: str | os.PathLike[str] | None = None,
    unnorm_key: str | None = None,
    device: Any = None,
    dtype: Any = None,
) -> Policy:
    """A policy ready to act. Rank, statistics, cameras and prompt come with it and are never asked for.

    Args:
        path_or_repo: folder or Hub id of one adapter, of a run (its latest adapter is taken, unless `task` or `stage`
            choose another), or of a checkpoint without adapter.
        task: name or instruction of a task: the adapter that learned it, with its instruction as `act`'s default.
        stage: the policy after this stage; 0 is the base.
        base: where the base is, if not where the adapter says. It must be the very base the adapter was trained on.
        unnorm_key: data set whose statistics un-normalise, for a checkpoint without adapter that has several.
        device, dtype: of the model; None for the CPU and for the base's own.

    Raises:
        FileNotFoundError: nothing loadable at `path_or_repo`, or the base is not where it should be.
        ValueError: no such task or stage; damaged files; a base on which the adapter was not trained.

    Example:
        >>> policy = load_policy("runs/quickstart", task="turn on the stove")  # doctest: +SKIP
        >>> policy.act(image, proprio=state).shape  # doctest: +SKIP
        (8, 7)
    """
    folder = _local_folder(path_or_repo)
    adapters = find_adapters(folder)
    if not adapters and (folder / "config.json").is_file():
        if task is not None or stage not in (None, 0) or base is not None:
            raise ValueError(f"{folder} is a checkpoint without adapter; task, stage and base choose among adapters")
        return _base_policy(folder, unnorm_key, device, dtype)
    if not adapters and not (folder / "base").is_dir():
        raise FileNotFoundError(
            f"{folder} holds no adapter ({INFO}), no run (adapters/) and no checkpoint (config.json)"
        )
    chosen, instruction = _choose(adapters, folder, task, stage)
    if chosen is None:
        location = base or (_base_location(adapters[0]) if adapters else folder / "base")
        key = unnorm_key or (adapters[0].info.unnorm_key if adapters else None)
        recipe = adapters[0].info.training if adapters else {}
        return _base_policy(location, key, device, dtype, instruction, recipe)
    model, processor = load_openvla(base or _base_location(chosen), device=device, dtype=dtype)
    model, info = load_adapter(model, chosen.folder, "default")
    bounds = base_model(model).config.action_normalization
    normaliser = Normaliser(_read_statistics(chosen.folder), info.unnorm_key, bounds=bounds)
    if device is not None:
        model = model.to(device)
    return _policy(model, processor, normaliser, info.cameras, instruction, info.training)


def find_adapters(folder: Path) -> list[StoredAdapter]:
    """The adapters of a folder, by stage: the folder itself, or those below `adapters/`."""
    if (folder / INFO).is_file():
        return [StoredAdapter(folder, read_info(folder))]
    found = [StoredAdapter(file.parent, read_info(file.parent)) for file in folder.glob(f"adapters/*/{INFO}")]
    return sorted(found, key=lambda adapter: adapter.info.stage)


def relative_base(base: str | os.PathLike[str], adapter_folder: Path) -> str:
    """How infovla.json names a base: a folder relative to the adapter's, or a Hub id as it is."""
    return os.path.relpath(base, adapter_folder) if Path(base).is_dir() else str(base)


def _local_folder(path_or_repo: str | os.PathLike[str]) -> Path:
    if Path(path_or_repo).is_dir():
        return Path(path_or_repo)
    name = str(path_or_repo)
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {name}; give an adapter's or a run's folder, or a Hub id user/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name} is no folder here, and the Hub did not give it ({str(error).splitlines()[0]}); "
            "check the name, the network, and `hf auth login` for a private repository"
        ) from error


def _base_location(adapter: StoredAdapter) -> str | Path:
    name = adapter.info.base_model
    local = adapter.folder / name
    if local.is_dir():
        return local.resolve()
    if name.startswith(".") or Path(name).is_absolute():
        raise FileNotFoundError(
            f"the base of {adapter.folder} is not at {local}; put it back, or give load_policy its place as `base`"
        )
    return name


def _choose(
    adapters: list[StoredAdapter], folder: Path, task: str | None, stage: int | None
) -> tuple[StoredAdapter | None, str | None]:
    """The adapter to load, None for the base, and the instruction of `task`."""
    candidates = [adapter for adapter in adapters if stage is None or adapter.info.stage == stage]
    if stage != 0 and not candidates and (stage is not None or task is not None):
        raise ValueError(f"{folder} has no adapter of stage {stage or 1}; it has: {_listed(adapters)}")
    if task is None:
        alone = len(adapters) == 1 and adapters[0].folder == folder
        return (candidates[-1] if candidates else None), (adapters[0].info.instruction if alone else None)
    for adapter in candidates:
        for name in adapter.learned if stage is None else adapter.info.seen:
            if _same_task(task, name):
                return adapter, instruction_of(name)
    for name in adapters[0].info.seen if stage in (None, 0) and adapters else []:
        if _same_task(task, name):
            return None, instruction_of(name)  # a task of the base
    raise ValueError(f"{folder} has learned no task {task!r}; it has: {_listed(adapters)}")


def instruction_of(task: str) -> str:
    """The instruction of a task given by LIBERO's name of it.

    >>> instruction_of("KITCHEN_SCENE3_turn_on_the_stove")
    'turn on the stove'
    """
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def _same_task(given: str, name: str) -> bool:
    return given == name or given.lower().replace("_", " ") == instruction_of(name).lower()


def _listed(adapters: list[StoredAdapter]) -> str:
    return "; ".join(f"stage {adapter.info.stage}, {adapter.info.task}" for adapter in adapters) or "none"


def _base_policy(
    location: str | os.PathLike[str],
    unnorm_key: str | None,
    device: Any,
    dtype: Any,
    instruction: str | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Policy:
    model, processor = load_openvla(location, device=device, dtype=dtype)
    normaliser = Normaliser(model.norm_stats, unnorm_key, bounds=model.config.action_normalization)
    cameras = [AGENT_VIEW, WRIST_VIEW][: model.config.num_images_in_input]
    return _policy(model, processor, normaliser, cameras, instruction, recipe)


def _policy(
    model: Any,
    processor: Any,
    normaliser: Normaliser,
    cameras: list[str],
    instruction: str | None,
    recipe: Mapping[str, Any] | None,
) -> Policy:
    model.config.norm_stats = normaliser.as_statistics()  # what `predict_action` un-normalises with
    cameras = cameras or [AGENT_VIEW]
    return Policy(model, processor, normaliser, cameras=cameras, instruction=instruction, recipe=recipe)


def _read_statistics(folder: Path) -> dict[str, Any]:
    file = folder / STATISTICS
    try:
        statistics: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; copy the whole folder of the adapter") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{file} is damaged ({error}); copy or train the adapter again") from error
    return statistics
