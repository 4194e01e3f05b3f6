"""One LoRA adapter per task: add, continue, freeze, activate, save, load, and check against its base.

An adapter's folder:

    adapter_model.safetensors   the LoRA matrices, nothing of the base
    adapter_config.json         PEFT's own, readable by `PeftModel.from_pretrained`
    infovla.json                which base (with a fingerprint), task and stage, the resolved configuration, and
                                checksums of all four files
    dataset_statistics.json     the frozen normalisation
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import __version__
from .config import InfoVLAConfig
from .distributed import whole
from .files import atomic_folder, write_json
from .integrity import DamagedFileError, check_files, checksums, read_sealed, write_sealed
from .models.openvla.quantization import Quantization, logical_shape, quantization_of
from .reading import Checker, read_json

FORMAT_VERSION = 2  # 1 had no checksums
WEIGHTS, PEFT_CONFIG, INFO, STATISTICS = (
    "adapter_model.safetensors", "adapter_config.json", "infovla.json", "dataset_statistics.json"
)  # fmt: skip
BASE = "__base__"
"""In a list of adapters: the base alone (PEFT's own word)."""
_SAMPLE = 64  # values per tensor that enter a fingerprint
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
_VOLATILE = {
    "transformers_version", "dtype", "torch_dtype", "use_cache", "norm_stats", "acting", "architectures", "auto_map",
    "quantization_config",
}  # fmt: skip


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
        taps: {"layer"}: whose hidden states the terms of the loss compared.
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


# --- what is adapted -------------------------------------------------------------------------------------------------


def unused_modules(model: nn.Module) -> list[str]:
    """Prefixes of the modules that are stored in the checkpoint but never run, so that they get no gradient.

    OpenVLA reads the last but one block of each vision transformer: the last block, the final norm and SigLIP's
    attention pooling do nothing. With the L1 head, neither does `lm_head`.
    """
    names = [name for name, _ in base_model(model).named_modules()]
    unused = []
    for name in names:
        if re.fullmatch(r"vision_backbone\.(.+\.)?(fused_)?featurizer", name):
            blocks = [int(m[1]) for n in names if (m := re.fullmatch(re.escape(name) + r"\.blocks\.(\d+)", n))]
            unused += [f"{name}.blocks.{max(blocks)}.", f"{name}.norm.", f"{name}.attn_pool."]
    if getattr(base_model(model).config, "action_head", None) == "l1":
        unused.append("language_model.lm_head.")
    return unused


def freeze_unused(model: nn.Module) -> None:
    """Take the modules that never run out of training (all parameters are trained, as in the base stage)."""
    unused = tuple(unused_modules(model))
    for name, parameter in base_model(model).named_parameters():
        if name.startswith(unused):
            parameter.requires_grad_(False)


def target_modules(model: nn.Module, targets: str) -> list[str]:
    """Full names of the linear layers that get an adapter.

    Args:
        targets: `all-linear` = every linear layer that receives a gradient, `lm_head` excepted; otherwise last parts
            of names ("q_proj,v_proj") or full names, separated by commas.

    Raises:
        AdapterError: a name matches nothing.
    """
    unused = tuple(unused_modules(model))
    linear = [
        name.removesuffix(".base_layer")
        for name, module in base_model(model).named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    ]
    if targets == "all-linear":
        return [name for name in linear if not f"{name}.".startswith(unused) and not name.endswith("lm_head")]
    chosen: list[str] = []
    for target in filter(None, (part.strip() for part in targets.split(","))):
        matching = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matching:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise AdapterError(f"lora_targets: no linear layer is named {target!r}; choose among {known}")
        chosen += [name for name in matching if not f"{name}.".startswith(unused)]
    return chosen


def base_model(model: nn.Module) -> Any:
    """The model without PEFT around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# --- one per task ----------------------------------------------------------------------------------------------------


def add_adapter(model: nn.Module, name: str, config: InfoVLAConfig, *, start_from: str | None = None) -> PeftModel:
    """A new adapter, active and alone trainable; the base and all other adapters are frozen.

    It begins as the base (B = 0, A random under `config.seed` and the name), or as a copy of `start_from`.

    Args:
        model: the base, or the base with the adapters of earlier tasks.
        name: without dots, and no part of `lora_`.
        start_from: name of an adapter of the model (`adapter_init="continue"`).

    Raises:
        AdapterError: the name is taken or unusable; `start_from` is unknown or of another shape.
    """
    known = list(model.peft_config) if isinstance(model, PeftModel) else []
    if "." in name or name in "lora_" or name in known:  # PEFT finds an adapter's weights by its name
        raise AdapterError(f"an adapter's name must be new, without dots and no part of 'lora_', got {name!r}")
    if start_from is not None and start_from not in known:
        raise AdapterError(f"cannot start from adapter {start_from!r}: the model has {known or 'none'}")
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=target_modules(model, config.lora_targets),
        init_lora_weights="gaussian",  # OpenVLA's fine-tuning recipe
        bias="none",  # anything else would change the teacher, which is the base
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{config.seed}/{name}".encode()))
        peft_model = attach(model, name, lora)
    if start_from is not None:
        try:
            weights = get_peft_model_state_dict(peft_model, adapter_name=start_from, save_embedding_layers=False)
            _load_weights(peft_model, name, weights)
        except (AdapterError, RuntimeError) as error:
            raise AdapterError(
                f"adapter {start_from!r} has another shape than the new one (rank {config.lora_r}, targets "
                f"{config.lora_targets!r}); keep lora_r and lora_targets, or use adapter_init='fresh'"
            ) from error
    activate(peft_model, name, trainable=True)
    return peft_model


def merge_adapters(model: PeftModel, names: Sequence[str], into: str, *, weight: float = 1.0) -> PeftModel:
    """A new adapter, active and frozen, whose update is weight · Σ of those of `names`, exactly.

    Its rank is the sum of theirs, so that B = [B_1 … B_n] and A = [A_1; …; A_n].

    Raises:
        AdapterError: a name is unknown, or `into` is taken.
    """
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names or into in model.peft_config:
        raise AdapterError(f"cannot merge {list(names)} into {into!r}: the model has {list(model.peft_config)}")
    tuner: Any = model.base_model
    tuner.add_weighted_adapter(list(names), [weight] * len(names), into, combination_type="cat")
    activate(model, into)
    return model


def activate(model: PeftModel, name: str, *, trainable: bool = False) -> None:
    """Run with this adapter; it alone is trainable, or nothing is."""
    tuner: Any = model.base_model
    tuner.enable_adapter_layers()  # in case `deactivate` came before
    model.set_adapter(name, inference_mode=not trainable)
    mine = {id(parameter) for _, parameter in adapter_parameters(model, name)}
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and id(parameter) in mine)


def deactivate(model: nn.Module) -> None:
    """Run as the base alone, with nothing trainable; `activate` takes it back."""
    if isinstance(model, PeftModel):
        tuner: Any = model.base_model
        tuner.disable_adapter_layers()
        model.requires_grad_(False)


def switch(model: PeftModel, name: str) -> None:
    """Run with another frozen adapter: what `activate` does, in one pass over the adapted layers."""
    if active_adapter(model) is None:
        tuner: Any = model.base_model
        tuner.enable_adapter_layers()
    model.set_adapter(name, inference_mode=True)


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that the model runs with, None for the base alone."""
    layer: Any = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return None if layer is None or layer.disable_adapters else str(layer.active_adapters[0])


@contextmanager
def mixed_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Row i of every batch inside runs with the adapter `names[i]`, or with the base where it is `BASE`.

    Every adapted layer must see the batch as its first dimension, as OpenVLA's do.
    """
    if not isinstance(model, PeftModel):  # every row is the base's
        yield
        return
    tuner: Any = model.base_model
    enabled = active_adapter(model)
    if enabled is None:
        tuner.enable_adapter_layers()
    try:
        # What PeftModel.forward(adapter_names=...) does; `predict_action` calls parts of the model by itself.
        with tuner._enable_peft_forward_hooks(adapter_names=list(names)):
            yield
    finally:
        if enabled is None:
            deactivate(model)


def adapter_parameters(model: PeftModel, name: str) -> Iterable[tuple[str, nn.Parameter]]:
    """Names and parameters of one adapter."""
    return [(key, parameter) for key, parameter in model.named_parameters() if f".{name}." in key and ".lora_" in key]


def attach(model: nn.Module, name: str, lora: LoraConfig, *, empty: bool = False) -> PeftModel:
    """`model` with a new, untrained adapter of this shape beside those that it has.

    Args:
        empty: give it no values (the meta device): they are about to be read, and drawing them takes longer than that.
    """
    if isinstance(model, PeftModel):
        model.add_adapter(name, lora, low_cpu_mem_usage=empty)
        return model
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a deprecated name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return PeftModel(model, lora, adapter_name=name, low_cpu_mem_usage=empty)


def _load_weights(model: PeftModel, name: str, weights: Mapping[str, Tensor]) -> None:
    """Put LoRA matrices into an adapter of the model, and nothing else.

    Adapters made by OpenVLA's recipe also carry the whole `lm_head` of their base, which PEFT would write into ours.
    """
    lora = {key: tensor for key, tensor in weights.items() if ".base_layer." not in key}
    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if set(expected) != set(lora):
        missing, unknown = sorted(set(expected) - set(lora)), sorted(set(lora) - set(expected))
        raise AdapterError(
            f"the adapter's weights do not fit the model: {len(missing)} missing {missing[:3]!s:.300}, "
            f"{len(unknown)} unknown {unknown[:3]!s:.300}"
        )
    for key, tensor in lora.items():
        if tensor.shape != expected[key].shape or not tensor.is_floating_point():
            raise AdapterError(
                f"the adapter's weights do not fit the model: {key:.300} holds {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}, not floats of {tuple(expected[key].shape)}"
            )
    empty = any(parameter.is_meta for _, parameter in adapter_parameters(model, name))
    set_peft_model_state_dict(model, lora, adapter_name=name, low_cpu_mem_usage=empty)


# --- on disk ---------------------------------------------------------------------------------------------------------


def save_adapter(
    model: PeftModel,
    name: str,
    folder: str | os.PathLike[str],
    info: AdapterInfo,
    statistics: Mapping[str, Any],
    *,
    write: bool = True,
) -> Path:
    """Write one adapter's folder, at once.

    Args:
        statistics: {key: statistics}, see `Normaliser.as_statistics`.
        write: False in all processes but one. All must call: a sharded model's weights are gathered from them.
    """
    path = Path(folder)
    weights = adapter_weights(model, name)
    if not write:
        return path
    with atomic_folder(path) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        lora = model.peft_config[name]
        lora.base_model_name_or_path, lora.inference_mode = info.base_model, True
        lora.save_pretrained(str(temporary))
        write_json(temporary / STATISTICS, dict(statistics))
        write_info(temporary, info)
    return path


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
        raise AdapterError(f"{error}; copy or train the adapter again") from error
    return info


def adapter_weights(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What `adapter_model.safetensors` holds. All processes must call: a sharded model's are gathered from them."""
    parameters = {key: whole(parameter).detach() for key, parameter in adapter_parameters(model, name)}
    weights = get_peft_model_state_dict(model, parameters, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.contiguous() for key, tensor in weights.items()}


def write_adapter_weights(model: PeftModel, name: str, folder: Path, *, write: bool = True) -> None:
    """Only `adapter_model.safetensors`; see `save_adapter`."""
    weights = adapter_weights(model, name)
    if write:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter_weights(model: PeftModel, name: str, folder: Path) -> None:
    """Only `adapter_model.safetensors`, into an adapter that the model has.

    Raises:
        FileNotFoundError, AdapterError: there is none, it is damaged, or it does not fit.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"no adapter weights at {file}")
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged ({error!s:.500}); copy or train the adapter again") from error
    try:
        _load_weights(model, name, weights)
    except AdapterError as error:
        raise AdapterError(f"{file}: {error}; copy it again, or load it with its own base") from error


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
        raise AdapterError(f"{error}; copy or train the adapter again") from error
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


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str,
    *,
    trainable: bool = False,
    base_fingerprint: Mapping[str, str] | None = None,
) -> tuple[PeftModel, AdapterInfo]:
    """Add an adapter from its folder to the model it was trained on, and activate it.

    Args:
        base_fingerprint: of the model's base, where it is known already.

    Raises:
        FileNotFoundError, AdapterError: see `read_info`, `read_adapter_weights`, `check_base`.
    """
    path = Path(folder)
    info = check_adapter(path)
    check_base(model, info, path, actual=base_fingerprint)
    lora = read_lora(path)
    peft_model = attach(model, name, lora, empty=True)
    read_adapter_weights(peft_model, name, path)
    activate(peft_model, name, trainable=trainable)
    return peft_model, info


# --- which base ------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module, adapter: str | None = None) -> dict[str, str]:
    """What tells this base from another: a digest of its configuration, and one of its weights.

    Of each tensor the name, the shape and up to 64 values enter, rounded to bfloat16, so that a base gives the same
    fingerprint in float32 and in bfloat16; on 7 billion parameters this takes well under a second. Of what is held in
    4 bits only name and shape enter, because packed values differ between devices.

    Args:
        adapter: digest this adapter's weights instead of the base's.
    """
    base = base_model(model)
    if adapter is None:
        tensors = [
            (name.replace(".base_layer.", "."), parameter)
            for name, parameter in base.named_parameters()
            if ".lora_" not in name
        ]
    else:
        assert isinstance(model, PeftModel)
        tensors = [(name, parameter) for name, parameter in adapter_parameters(model, adapter)]
    return {"config": digest_config(base.config), "weights": digest_weights(tensors)}


def check_base(
    model: nn.Module,
    info: AdapterInfo,
    where: str | os.PathLike[str] = "the adapter",
    *,
    actual: Mapping[str, str] | None = None,
) -> None:
    """Raise an AdapterError if the adapter was trained on another base than this model.

    Args:
        actual: the fingerprint of the model's base, where it is known already. That of its files lets an adapter that
            was trained on the base in full go onto the same base in 4 bits.
    """
    held = quantization_of(base_model(model))
    if held != info.quantization and (actual is None or info.quantization != "none"):
        raise AdapterError(
            f"{where} was trained on a base with quantization={info.quantization!r:.40}, this one has {held!r}; "
            f"load it with load_openvla(..., quantization={info.quantization!r:.40}), or the policy with load_policy"
        )
    actual = actual or fingerprint(model)
    differing = [part for part in ("config", "weights") if actual[part] != info.base_fingerprint.get(part)]
    if differing:
        raise AdapterError(
            f"{where} was trained on {info.base_model}, another base than "
            f"{base_model(model).config._name_or_path or 'this model'}: different {' and '.join(differing)}; "
            "load it with its own base"
        )


def digest_weights(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The digest of named tensors that enters a fingerprint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        if (packed := logical_shape(tensor)) is not None:
            digest.update(f"{name} {packed}\n".encode())
            continue
        gathered = whole(tensor).detach()
        flat = gathered.flatten()
        values = flat[:: max(1, -(-len(flat) // _SAMPLE))].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(gathered.shape)}\n".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def digest_config(config: Any) -> str:
    """The digest of a model's configuration that enters a fingerprint."""
    return hashlib.sha256(json.dumps(_stable(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()


def _stable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what loading, saving and training change."""
    return {
        key: _stable(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _VOLATILE and not str(key).startswith("_")
    }
