"""Policies from where they lie: an adapter, a run, a base checkpoint; a local folder or a repository of the Hub.

Of a repository, what it says of itself is read first; the weights of an adapter are downloaded when they are needed,
and found in the cache afterwards, without a network too.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapter_files import INFO, PEFT_CONFIG, STATISTICS, WEIGHTS, AdapterError, AdapterInfo, read_statistics
from .adapters import base_model, fingerprint
from .data.normalisation import Normaliser, find_key
from .foreign import fingerprint_of_files
from .inference import Policy
from .library import AdapterLibrary, StoredAdapter, choose, find_adapters, tasks_after
from .models.openvla import load_openvla
from .models.openvla.checkpoint import known_statistics, says_images
from .publishing import RESULTS, check_base_files, create_collection, push_to_hub
from .reading import is_inside, read_json
from .remote import Access, Snapshot, check_file_names, check_no_pickles, open_snapshot
from .results import Results

__all__ = ["ListedAdapter", "create_collection", "list_adapters", "load_policy", "push_to_hub", "relative_base"]

AGENT_VIEW, WRIST_VIEW = "agentview", "robot0_eye_in_hand"
_DESCRIPTIONS = (INFO, f"*/{INFO}", PEFT_CONFIG, f"*/{PEFT_CONFIG}", "config.json", RESULTS)
_TRAINER_STATE = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin")
"""What Trainer leaves in a folder here beside an adapter. Nothing of it is read."""
_CHECKPOINT = ("*.json", "*.safetensors", "*.model", "*.txt", "*--*.pt")
"""Of a checkpoint without adapter; the .pt files of OpenVLA-OFT are read with weights_only=True."""


@dataclass(frozen=True)
class Place:
    """What `load_policy` was given: a folder, or a repository as far as it is in the cache."""

    folder: Path
    snapshot: Snapshot | None = None

    def fetch(self, adapter: StoredAdapter, names: Sequence[str] = (WEIGHTS, PEFT_CONFIG, INFO, STATISTICS)) -> None:
        """Have the files of an adapter on this machine."""
        if self.snapshot is not None:
            folders = [each.relative_to(self.folder) for each in (adapter.folder, adapter.twin) if each is not None]
            self.snapshot.fetch(*((folder / name).as_posix() for folder in folders for name in names))


def load_policy(
    repo_or_path: str | os.PathLike[str],
    *,
    task: str | Sequence[str] | None = None,
    stage: int | None = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    unnorm_key: str | None = None,
    cameras: str | Sequence[str] | None = None,
    device: Any = None,
    dtype: Any = None,
    quantization_config: Any = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Policy:
    """A policy ready to act. Rank, statistics, cameras and prompt come with it and are never asked for.

    Args:
        repo_or_path: folder or Hub id of one adapter, of a run (its latest adapter is taken, unless `task` or `stage`
            choose another), or of a checkpoint without adapter.
        task: name or instruction of a task: the adapter that learned it, with its instruction as `act`'s default.
            Several: the adapters of all of them are read, and the first one is in use; see `Policy.use`.
        stage: the policy after this stage; 0 is the base.
        revision: branch, tag or commit of the repository; None for its main branch.
        base: where the base is, if not where the adapter says. It must be the very base the adapter was trained on.
        unnorm_key: data set whose statistics un-normalise, for a checkpoint without adapter that has several.
        cameras: names of the images that a checkpoint without adapter reads, in its order; None = as it says. A folder
            of the original OpenVLA-OFT does not say it, and is taken for one that reads one image, with a warning.
        device, dtype: of the model; None for the CPU and for the base's own. A type or its name, as in transformers.
        quantization_config: load the base quantised, as in transformers' `from_pretrained`; None = as it was held when
            the adapter was trained (`AdapterInfo.quantization`).
        token: for a private repository; None is that of `hf auth login`.
        cache_dir, local_files_only: where downloads are kept, and whether to take only what is there; as in
            transformers, for the base too.

    Raises:
        FileNotFoundError: nothing loadable at `repo_or_path`, or the base is not where it should be.
        HubError: the Hub refuses, or cannot be reached.
        ValueError: no such task or stage; damaged files; a base on which the adapter was not trained; a repository
            that holds pickles or names files outside itself (AdapterError); no statistics for `unnorm_key`, or several
            and no key (UnknownStatisticsError, also a KeyError), which is found before any weights are fetched.

    Example:
        >>> policy = load_policy("runs/quickstart", task="turn on the stove")  # doctest: +SKIP
        >>> policy.act(image, proprio=state).shape  # doctest: +SKIP
        (8, 7)
    """
    check_device(device)
    cameras = [cameras] if isinstance(cameras, str) else cameras
    access = Access(token, cache_dir, local_files_only)
    place = _place(repo_or_path, revision, access)
    adapters = _adapters_in(place, repo_or_path, chooses=task is not None or stage not in (None, 0), base=base)
    options = {"device": device, "dtype": dtype, "quantization_config": quantization_config, **vars(access)}
    options = {name: value for name, value in options.items() if value is not None}
    if not adapters and (place.folder / "config.json").is_file():
        if place.snapshot is not None:
            place.snapshot.fetch(STATISTICS)
            _check_key(known_statistics(str(place.folder), {}), unnorm_key)
            place.snapshot.fetch(*_CHECKPOINT)
        return _base_policy(place.folder, unnorm_key, cameras, options)
    if task is not None and not isinstance(task, Sequence):
        raise ValueError(f"task must be the name or instruction of a task, or several, got {task!r:.80}")
    tasks = [task] if task is None or isinstance(task, str) else list(task)
    if not tasks:
        raise ValueError("task names no task; leave it out, or name one of those that the adapters have learned")
    chosen = [choose(adapters, place.folder, os.fspath(repo_or_path), each, stage) for each in tasks]
    if not adapters:
        return _base_policy(base or place.folder / "base", unnorm_key, cameras, options)
    first, origin = chosen[0][0], chosen[0][0] or adapters[0]
    reference = origin.info
    location = base or _base_location(place, origin, ("config.json", STATISTICS))
    if base is None and reference.base_revision is not None:
        options["revision"] = reference.base_revision
    key = unnorm_key or reference.unnorm_key or None
    if first is not None:
        place.fetch(first, (STATISTICS,))
    of_base = {} if _has_statistics(first) else known_statistics(os.fspath(location), options)
    if of_base is not None:
        find_key(_statistics(place, first, adapters, of_base, key), key)
    if base is None:
        _base_location(place, origin, _CHECKPOINT)
    check_base_files(Path(location))
    if quantization_config is None:
        options["quantization"] = reference.quantization
    named = list(cameras or reference.cameras)
    if reference.cameras and named != list(reference.cameras):
        raise ValueError(f"the adapter was trained with cameras {reference.cameras}; leave cameras={cameras!r} out")
    model, processor = load_openvla(location, images=len(named) or None, **options)
    # In 4 bits or float16 it no longer shows the bfloat16 values of its files, in which a fingerprint is taken.
    changed = quantization_config is not None or model.dtype == torch.float16
    of_files = changed and reference.quantization == "none"
    held = fingerprint(model)
    found = fingerprint_of_files(location, model, options) if of_files else held
    library = AdapterLibrary(adapters, place.folder, os.fspath(repo_or_path), place.fetch, found, held)
    for adapter, _ in reversed(chosen):
        model = library.switch(model, adapter)
    statistics = _statistics(place, first, adapters, base_model(model).norm_stats, key)
    normaliser = Normaliser(statistics, key, bounds=base_model(model).config.action_normalization)
    return _policy(
        model if device is None else model.to(device), processor, normaliser, chosen[0][1], reference, library,
        None if reference.cameras else cameras,
    )  # fmt: skip


def check_device(device: Any) -> None:
    """Try it, before anything is loaded."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # torch raises both for a device that is not there
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"the device {str(device)!r:.80} cannot be used here ({reason}); cpu always can") from error


@dataclass(frozen=True)
class DescribedPolicy:
    """What is known of a policy without its weights.

    Attributes:
        recipe: `Policy.recipe`.
        tasks: names of those that it has learned, in that order.
        key: of the statistics that un-normalise. Those of a base that is not on this machine are not looked at.
    """

    recipe: dict[str, Any]
    tasks: list[str]
    key: str | None


def _statistics_of(checkpoint: Path) -> dict[str, Any]:
    """What will be the model's `norm_stats`: those of a file of their own come before those of the configuration."""
    for name in (STATISTICS, "config.json"):
        if (checkpoint / name).is_file():
            content = read_json(checkpoint / name, error=ValueError, cure="copy it again")
            return (content if name == STATISTICS else content.get("norm_stats")) or {}
    return {}


def describe_policy(
    repo_or_path: str | os.PathLike[str],
    *,
    stage: int | None = None,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    unnorm_key: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> DescribedPolicy:
    """Look at the policy that `load_policy` gives, without reading weights.

    Raises:
        As `load_policy`, as far as it is seen without the weights.
    """
    place = _place(repo_or_path, revision, Access(token, cache_dir, local_files_only))
    adapters = _adapters_in(place, repo_or_path, chooses=stage not in (None, 0), base=base)
    chosen, _ = choose(adapters, place.folder, os.fspath(repo_or_path), None, stage)
    if not adapters:
        folder = place.folder if (place.folder / "config.json").is_file() else place.folder / "base"
        if place.snapshot is not None:
            place.snapshot.fetch(STATISTICS)
        return DescribedPolicy({}, [], find_key(_statistics_of(folder), unnorm_key))
    reference = chosen or adapters[0]
    if chosen is not None and place.snapshot is None and not (chosen.folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no adapter weights at {chosen.folder / WEIGHTS}; copy the whole folder again")
    if base is None and place.snapshot is None:
        _base_location(place, reference)
    key = unnorm_key or reference.info.unnorm_key or None
    location = Path(base or reference.folder / reference.info.base_model)
    of_base = _statistics_of(location) if (location / "config.json").is_file() else None
    if of_base is not None or (chosen is not None and not chosen.reference):
        if chosen is not None:
            place.fetch(chosen, (STATISTICS,))
        key = find_key(_statistics(place, chosen, adapters, of_base or {}, key), key)
    return DescribedPolicy(_recipe(reference.info), tasks_after(adapters, stage), key)


def _recipe(info: AdapterInfo) -> dict[str, Any]:
    """How an adapter was trained, as far as it says so; the suite, also where it says nothing else."""
    return {**({"suite": info.suite} if info.suite else {}), **info.training}


def _adapters_in(
    place: Place, name: str | os.PathLike[str], *, chooses: bool, base: str | os.PathLike[str] | None
) -> list[StoredAdapter]:
    """The adapters of a place; none of a checkpoint, among which nothing can be chosen."""
    if base is not None and not Path(base).is_dir() and (Path(base).is_absolute() or os.fspath(base).count("/") != 1):
        raise FileNotFoundError(f"there is no folder {base}, and no Hub id user/name has this form; correct `base`")
    adapters = find_adapters(place.folder)
    if not adapters and (place.folder / "config.json").is_file():
        if chooses or base is not None:
            raise ValueError(f"{name} is a checkpoint without adapter; task, stage and base choose among adapters")
    elif not adapters and not (place.folder / "base").is_dir():
        raise FileNotFoundError(
            f"{name} holds no adapter ({INFO}), no run (adapters/) and no checkpoint (config.json)"
        )
    return adapters


@dataclass(frozen=True)
class ListedAdapter:
    """One adapter of a repository or folder, as far as it says itself.

    Attributes:
        folder: in the repository; "." is its root.
        stage: 1, 2, … in the stream.
        tasks: names of the tasks it was trained on.
        seen: names of all tasks learned up to then.
        base_model, base_revision: what it goes onto.
        success: (successes, episodes) of the tasks it was trained on, right after its stage; those that were not
            measured are left out.
        info: everything else that `infovla.json` says.
    """

    folder: str
    stage: int
    tasks: list[str]
    seen: list[str]
    base_model: str
    base_revision: str | None
    success: dict[str, tuple[int, int]]
    info: AdapterInfo


def list_adapters(
    repo_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[ListedAdapter]:
    """What a repository, a run or an adapter's folder holds, by stage, without downloading weights.

    Args:
        revision, token, cache_dir, local_files_only: see `load_policy`.

    Raises:
        FileNotFoundError: no such repository or folder.
        HubError, AdapterError: see `load_policy`.

    Example:
        >>> [adapter.tasks for adapter in list_adapters("user/infovla-libero-goal")]  # doctest: +SKIP
        [['put_the_bowl_on_top_of_the_cabinet'], ['turn_on_the_stove']]
    """
    place = _place(repo_or_path, revision, Access(token, cache_dir, local_files_only))
    results = Results.load(place.folder / RESULTS) if (place.folder / RESULTS).is_file() else None
    return [_listing(adapter, place.folder, results) for adapter in find_adapters(place.folder)]


def _listing(adapter: StoredAdapter, folder: Path, results: Results | None) -> ListedAdapter:
    info, success = adapter.info, {}
    if results is not None and 0 < info.stage < results.stages:
        for row, task in enumerate(results.tasks):
            reached, tried = results.successes[row][info.stage], results.episodes[row][info.stage]
            if task.name in adapter.learned and reached is not None and tried is not None:
                success[task.name] = (reached, tried)
    return ListedAdapter(
        folder=adapter.folder.relative_to(folder).as_posix(),
        stage=info.stage,
        tasks=adapter.learned,
        seen=list(info.seen),
        base_model=info.base_model,
        base_revision=info.base_revision,
        success=success,
        info=info,
    )


def relative_base(base: str | os.PathLike[str], adapter_folder: Path) -> str:
    """How infovla.json names a base: a folder relative to the adapter's, or a Hub id as it is."""
    if not Path(base).is_dir():
        return str(base)
    # The real places: the system follows links before it goes up, `relpath` knows of none. A base that is a link
    # itself stays one, so that a copy of both finds its own.
    return os.path.relpath(Path(base).parent.resolve() / Path(base).name, adapter_folder.resolve())


def _place(repo_or_path: str | os.PathLike[str], revision: str | None, access: Access) -> Place:
    """The folder, or what a repository says of itself; refused if it holds what must not be in it."""
    name = os.fspath(repo_or_path)
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder here, which has no revisions; leave `revision` out")
        place = Place(Path(name))
        files: Sequence[str] = _read_files(place.folder)
    elif Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no folder {name}; give an adapter's or a run's folder, or a Hub id user/name"
        )
    else:
        snapshot = open_snapshot(name, _DESCRIPTIONS, revision=revision, access=access)
        place = Place(snapshot.folder, snapshot)
        files = snapshot.files or [file.relative_to(place.folder).as_posix() for file in place.folder.rglob("*")]
    # A checkpoint of OpenVLA-OFT has .pt files, and beside them the adapter that was merged into it.
    if any(Path(file).name in (INFO, PEFT_CONFIG) and Path(file).parts[0] != "lora_adapter" for file in files):
        check_file_names(files, name)
        unread = [file for file in files if place.snapshot is None and _TRAINER_STATE.fullmatch(file)]
        check_no_pickles(files, name, but=unread)
    return place


def _read_files(folder: Path) -> list[str]:
    """What may be read of a folder here: all of a published copy; of a run in progress not its trainer's own files."""
    if not any(folder.glob(f"stage_*/{INFO}")) and not any((folder / name).is_file() for name in (INFO, PEFT_CONFIG)):
        if not any(folder.glob(f"adapters/*/{INFO}")):
            return [file.name for file in folder.iterdir() if file.is_file()]
        files = [
            *folder.glob("*"),
            *folder.glob("merged/**/*"),
            *folder.glob("adapters/**/*"),
            *folder.glob("base/**/*"),
        ]
    else:
        files = list(folder.rglob("*"))
    names = [file.relative_to(folder) for file in files if file.is_file()]
    return [
        name.as_posix()
        for name in names
        if not any(part.startswith(".") or re.fullmatch(r"checkpoint-\d+", part) for part in name.parts[:-1])
    ]


def _base_location(place: Place, adapter: StoredAdapter, files: Sequence[str] = ()) -> str | Path:
    """Where an adapter's base is; of one that lies in its own repository, have these files on this machine."""
    name = adapter.info.base_model
    local = adapter.folder / name
    if place.snapshot is not None and name.startswith(".") and not adapter.reference:
        inside = os.path.relpath(os.path.normpath(local), place.folder)
        if not is_inside(inside):
            raise AdapterError(
                f"{place.snapshot.repo_id} says that its base lies outside itself, at {name!r}; it is not loaded. "
                "Give the base as `base` if you know it"
            )
        place.snapshot.fetch(*(f"{inside}/{pattern}" for pattern in files))
        return place.folder / inside
    if place.snapshot is None and local.is_dir():
        return local.resolve()
    if name.startswith(".") or Path(name).is_absolute() or name.count("/") > 1 or not name:
        raise FileNotFoundError(
            f"the base of {adapter.folder} is not at {local}; put it back, or give load_policy its place as `base`"
        )
    if adapter.reference and "/" not in name:
        raise FileNotFoundError(
            f"{adapter.folder} is a plain PEFT adapter and names its base {name!r}, which is nothing that can be "
            "found; give load_policy the base as `base`"
        )
    return name


def _statistics(
    place: Place, chosen: StoredAdapter | None, adapters: Sequence[StoredAdapter], base: Any, key: str | None
) -> dict[str, Any]:
    """The adapter's statistics; for the base alone its own, or those that the run computed if it has none."""
    if chosen is None and not {key, f"{key}_no_noops"} & set(base):
        chosen = adapters[0]
        place.fetch(chosen, (STATISTICS,))
    return read_statistics(chosen.folder) if chosen is not None and _has_statistics(chosen) else dict(base)


def _has_statistics(adapter: StoredAdapter | None) -> bool:
    """Whether an adapter has statistics of its own: a plain PEFT adapter need not."""
    return adapter is not None and (not adapter.reference or (adapter.folder / STATISTICS).is_file())


def _check_key(statistics: Mapping[str, Any] | None, key: str | None) -> None:
    """Find statistics that lack a key before weights are fetched and read; None is not checked."""
    if statistics is not None:
        find_key(statistics, key)


def _base_policy(
    location: str | os.PathLike[str],
    unnorm_key: str | None,
    cameras: Sequence[str] | None,
    options: Mapping[str, Any],
) -> Policy:
    check_base_files(Path(location))
    _check_key(known_statistics(os.fspath(location), dict(options)), unnorm_key)
    images = None if cameras is None else len(cameras)
    model, processor = load_openvla(location, images=images, **options)
    if images is None and not says_images(model.config, os.fspath(location), dict(options)):
        warnings.warn(
            f"{location} is of the original OpenVLA-OFT and does not say how many images it reads: it is given the "
            f"{AGENT_VIEW} alone. Name them (cameras={[AGENT_VIEW, WRIST_VIEW]} for its LIBERO checkpoints, "
            "--cameras on the command line), and set `crop` (--center_crop) if it was trained with random crops",
            stacklevel=3,
        )
    normaliser = Normaliser(model.norm_stats, unnorm_key, bounds=model.config.action_normalization)
    return _policy(model, processor, normaliser, None, None, None, cameras)


def _policy(
    model: Any,
    processor: Any,
    normaliser: Normaliser,
    instruction: str | None,
    info: AdapterInfo | None,
    library: AdapterLibrary | None,
    named: Sequence[str] | None = None,
) -> Policy:
    config = base_model(model).config
    acting = dict(config.acting or {}) if info is None else _acting_of(info)
    config.norm_stats = normaliser.as_statistics()  # what `predict_action` un-normalises with
    cameras = named or acting.get("cameras") or [AGENT_VIEW, WRIST_VIEW][: config.num_images_in_input]
    config.acting = acting or None  # goes along where the adapter is merged and the base saved
    return Policy(
        model,
        processor,
        normaliser,
        cameras=cameras,
        instruction=instruction,
        recipe=_recipe(info) if info else None,
        crop=acting.get("center_crop"),
        prompt=acting.get("prompt") or "",
        library=library,
    )


def _acting_of(info: AdapterInfo) -> dict[str, Any]:
    crop = info.image_pipeline.get("center_crop", info.training.get("center_crop"))
    return {"prompt": info.prompt, "center_crop": crop, "cameras": info.cameras}
