"""The files of an adapter's folder, and what they may say: written with checksums, checked when they are read.

adapter_model.safetensors   the LoRA matrices, nothing of the base
adapter_config.json         PEFT's own, readable by `PeftModel.from_pretrained`
infovla.json                which base (with a fingerprint), task and stage, the resolved configuration, and
                            checksums of all four files
dataset_statistics.json     the frozen normalisation
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig

from . import __version__
from .integrity import DamagedFileError, check_files, checksums, read_sealed, write_sealed
from .models.openvla.quantization import Quantization
from .reading import Checker, read_json

FORMAT_VERSION = 2  # 1 had no checksums
WEIGHTS, PEFT_CONFIG, INFO, STATISTICS = (
    "adapter_model.safetensors", "adapter_config.json", "infovla.json", "dataset_statistics.json"
)  # fmt: skip
_HIGHEST_RANK = 1 << 16  # memory, not mathematics
_MOST_TARGETS = 10_000
_LORA_INIT = (True, False, "gaussian")  # others change the base, or are computed from it
_LORA_FREE = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
        "init_lora_weights", "use_dora", "lora_bias", "runtime_config", "qalora_group_size", "megatron_core",
    }
)  # fmt: skip
"""What `adapter_config.json` may choose. The rest of PEFT's fields reach beyond LoRA on linear layers: into the base,
other modules, code that is imported by its name, and patterns, which a regular expression may match for ever."""


class AdapterError(ValueError):
    """An adapter that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class AdapterInfo:
    """What `infovla.json` holds.

    Attributes:
        base_model: hub id, or folder relative to the adapter's.
        base_revision: commit of the base on the Hub it was trained on; None for a folder.
        base_fingerprint: of the base it was trained on, see `fingerprint`.
        unnorm_key: key of its statistics.
        suite, task, instruction: what was learned.
        stage: 1, 2, ... in the stream.
        seen: names of all tasks learned up to and including this stage, in their order.
        tasks: the same with instructions, [{"name", "instruction", "stage"}]; stage 0 is the base.
        stream: notation of the stream, "B3-2N1".
        cameras: cameras the policy sees, in the model's order.
        statistics: {"file", "key"}: the frozen normalisation, and which of its data sets is used.
        prompt: what the model reads, with {instruction} in it; "" for the package's own.
        image_pipeline: what happens to an image before the model sees it: {"rendered_size", "input_sizes" (pixels),
            "resize", "center_crop"}.
        taps: {"layer", "pooling"}: whose hidden states the terms of the loss compared, and which of them RAC did
            ("action", "prompt" or "vision", see `InfoVLAConfig.rac_pooling`).
        versions: of the libraries it was trained with.
        training: the resolved configuration.
        quantization: how the base was held, and with it the teacher; `nf4` = in 4 bits (QLoRA).
        package_version: of infovla_peft.
        sha256: of the files beside it, by their names; written by `write_info`.
    """

    base_model: str
    base_fingerprint: dict[str, str]
    unnorm_key: str
    base_revision: str | None = None
    task: str = ""
    instruction: str = ""
    suite: str = ""
    stage: int = 0
    seen: list[str] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    stream: str = ""
    cameras: list[str] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    image_pipeline: dict[str, Any] = field(default_factory=dict)
    taps: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization = "none"
    package_version: str = __version__
    sha256: dict[str, str] = field(default_factory=dict, compare=False)
    format_version: int = FORMAT_VERSION


def write_info(folder: Path, info: AdapterInfo) -> None:
    """Write `infovla.json` with checksums of the files beside it: last of all, and again after any change of them."""
    content = {**asdict(info), "format_version": FORMAT_VERSION}
    files = [folder / name for name in (WEIGHTS, PEFT_CONFIG, STATISTICS) if (folder / name).is_file()]
    write_sealed(folder / INFO, content, checksums(files, folder))


def check_adapter(folder: str | os.PathLike[str]) -> AdapterInfo:
    """Read `infovla.json` and check every file of the folder against its checksum (a few seconds per gigabyte).

    Raises:
        FileNotFoundError, AdapterError: see `read_info`; a file is missing or was changed.
    """
    info = read_info(folder)
    if strange := [name for name in info.sha256 if name != Path(name).name]:
        raise AdapterError(f"{Path(folder) / INFO} names a file elsewhere ({strange[0]}); do not trust this adapter")
    absent = [name for name in (WEIGHTS, PEFT_CONFIG, STATISTICS) if name not in info.sha256]
    if info.format_version >= 2 and absent:
        raise AdapterError(f"{Path(folder) / INFO} has no checksum of {absent[0]}; copy or train the adapter again")
    if lost := [name for name in info.sha256 if not (Path(folder) / name).is_file()]:
        raise FileNotFoundError(f"{folder} holds no whole adapter: {lost[0]} is missing; copy the whole folder")
    try:
        check_files(Path(folder), info.sha256)
    except DamagedFileError as error:
        raise AdapterError(error.with_cure("copy or train the adapter again")) from error
    return info


def read_info(folder: str | os.PathLike[str]) -> AdapterInfo:
    """`infovla.json`; fields of later versions are ignored.

    Raises:
        FileNotFoundError: there is none.
        AdapterError: it is damaged, or of a later format.
    """
    file = Path(folder) / INFO
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter of this package: {INFO} is missing")
    try:
        content = read_sealed(file, newest=FORMAT_VERSION)
        known = {option.name for option in fields(AdapterInfo)}
        info = AdapterInfo(**{key: value for key, value in content.items() if key in known})
        _check_types(info, Checker(str(file), AdapterError, "copy or train the adapter again"))
        return info
    except DamagedFileError as error:
        raise AdapterError(error.with_cure("copy or train the adapter again")) from error
    except TypeError as error:
        raise AdapterError(f"{file} is damaged ({error!s:.500}); copy or train the adapter again") from error


def _check_types(info: AdapterInfo, check: Checker[AdapterError]) -> None:
    for name in ("base_model", "unnorm_key", "task", "instruction", "suite", "stream", "prompt", "quantization"):
        check.typed(getattr(info, name), str, name)
    check.typed(info.base_revision, str, "base_revision", optional=True)
    check.count(info.stage, "stage")
    for name in ("base_fingerprint", "sha256"):
        check.strings(getattr(info, name), name)
    for name in ("seen", "cameras"):
        check.texts(getattr(info, name), name)
    for place, task in check.items(info.tasks, "tasks"):
        check.typed(task, dict, place)
    for name in ("statistics", "image_pipeline", "taps", "versions", "training"):
        check.typed(getattr(info, name), dict, name)


def read_statistics(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`dataset_statistics.json` of an adapter.

    Raises:
        FileNotFoundError, AdapterError: there is none; it is damaged.
    """
    file = Path(folder) / STATISTICS
    cure = "copy or train the adapter again"
    try:
        statistics: dict[str, Any] = read_json(file, error=AdapterError, cure=f"it is damaged, {cure}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing; copy the whole folder of the adapter") from error
    check = Checker(str(file), AdapterError, cure)
    for key, described in check.typed(statistics, dict, "the content").items():
        for part in ("action", "proprio"):
            numbers = check.typed(check.typed(described, dict, f"{key!r:.60}").get(part, {}), dict, part)
            for name in ("q01", "q99", "min", "max"):
                values = check.typed(numbers.get(name, []), list, f"{part}, {name}")
                if not all(type(value) in (int, float) for value in values):
                    check.fail(f"{part}, {name}", "numbers", values)
            mask = check.typed(numbers.get("mask", []), list, f"{part}, mask")
            check.need(all(type(value) is bool for value in mask), f"{part}, mask", "true or false each", mask)
    key = read_info(folder).unnorm_key if (Path(folder) / INFO).is_file() else ""
    if key and statistics and not {key, f"{key}_no_noops"} & set(statistics):
        raise AdapterError(f"{file} lacks {key!r:.80}, which {INFO} beside it names; {cure}")
    return statistics


def read_lora(folder: str | os.PathLike[str]) -> LoraConfig:
    """`adapter_config.json` of an adapter.

    Raises:
        FileNotFoundError, AdapterError: there is none; it is damaged, or configures something else than LoRA.
    """
    file = Path(folder) / PEFT_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: {PEFT_CONFIG} is missing; copy the whole folder")
    content = read_json(file, error=AdapterError, cure="copy or train the adapter again")
    try:
        if content["peft_type"] != "LORA":
            raise ValueError(f"peft_type is {content['peft_type']!r:.80}")
        lora = LoraConfig.from_pretrained(str(folder))
        check_lora(lora)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error!s:.300}"
        raise AdapterError(
            f"{file} is no configuration of LoRA ({problem}); copy or train the adapter again"
        ) from error
    return lora


def check_lora(lora: LoraConfig) -> None:
    """Refuse a configuration that does more than LoRA on linear layers which it names.

    Raises:
        ValueError: which of its fields does.
    """
    if type(lora.r) is not int or not 1 <= lora.r <= _HIGHEST_RANK:
        raise ValueError(f"r is {lora.r!r:.80}")
    for name, highest in (("lora_alpha", math.inf), ("lora_dropout", 1.0)):
        value = getattr(lora, name)
        if type(value) not in (int, float) or not 0 <= value < highest:
            raise ValueError(f"{name} is {value!r:.80}")
    for name in ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"):
        if type(getattr(lora, name)) is not bool:
            raise ValueError(f"{name} is {getattr(lora, name)!r:.80}")
    if lora.init_lora_weights not in _LORA_INIT:
        raise ValueError(f"init_lora_weights is {lora.init_lora_weights!r:.80}, which changes the base")
    targets = lora.target_modules
    if targets != "all-linear":
        named = isinstance(targets, (list, set)) and 1 <= len(targets) <= _MOST_TARGETS
        if not named or not all(isinstance(each, str) and re.fullmatch(r"[\w.-]{1,300}", each) for each in targets):
            raise ValueError(f"target_modules is {targets!r:.80}; it must be a list of layers' names, not a pattern")
    neutral = LoraConfig()
    for option in fields(lora):
        value = getattr(lora, option.name)
        if option.name not in _LORA_FREE and value and value != getattr(neutral, option.name):
            raise ValueError(f"{option.name} is {value!r:.80}, which must be left empty")
