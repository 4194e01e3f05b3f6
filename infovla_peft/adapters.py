"""One LoRA adapter per task: add, continue, freeze, activate, save, load, and check against its base.

What its folder holds: `adapter_files`.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter_files import (
    INFO,
    PEFT_CONFIG,
    STATISTICS,
    WEIGHTS,
    AdapterError,
    AdapterInfo,
    check_adapter,
    check_lora,
    read_lora,
    write_info,
)
from .config import InfoVLAConfig
from .distributed import whole
from .files import atomic_folder, check_replaceable, write_json
from .fingerprints import digest_config, digest_weights
from .models.openvla.quantization import quantization_of

BASE = "__base__"
"""In a list of adapters: the base alone (PEFT's own word)."""
TERM_NETWORK = "infovla_{}_network"
"""Under which a model has the network of a term of the loss, which is trained along and not saved with the adapter."""


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
        AdapterError: a name matches nothing, or none names a layer that runs.
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
    if not chosen:
        raise AdapterError(
            f"lora_targets {targets!r} names no layer that runs; choose others, or all-linear for every one that does"
        )
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
        name: see `attach`.
        start_from: name of an adapter of the model (`adapter_init="continue"`).

    Raises:
        AdapterError: the name is taken or unusable; `start_from` is unknown, or of another shape or scale.
    """
    known = list(model.peft_config) if isinstance(model, PeftModel) else []
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
    if start_from is not None and isinstance(model, PeftModel):
        theirs: Any = model.peft_config[start_from]
        if theirs.r == lora.r and theirs.lora_alpha != lora.lora_alpha:
            raise AdapterError(
                f"adapter {start_from!r} has lora_alpha {theirs.lora_alpha}, the new one {lora.lora_alpha}: scaled "
                "differently it would not begin as a copy; keep lora_alpha, or use adapter_init='fresh'"
            )
    before = active_adapter(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{config.seed}/{name}".encode()))
        peft_model = attach(model, name, lora)
    if start_from is not None:
        try:
            weights = get_peft_model_state_dict(peft_model, adapter_name=start_from, save_embedding_layers=False)
            _load_weights(peft_model, name, weights)
        except (AdapterError, RuntimeError) as error:
            _take_back(peft_model, name, before)
            raise AdapterError(
                f"adapter {start_from!r} has another shape than the new one (rank {config.lora_r}, targets "
                f"{config.lora_targets!r}); keep lora_r and lora_targets, or use adapter_init='fresh'"
            ) from error
    activate(peft_model, name, trainable=True)
    return peft_model


def merge_adapters(
    model: PeftModel, names: Sequence[str], into: str, *, weight: float = 1.0, rank: int = 0
) -> PeftModel:
    """A new adapter, active and frozen, whose update is weight · Σ of those of `names`.

    Args:
        rank: 0 = exactly, by PEFT's `cat`, the rank being the sum of theirs: B = [B_1 … B_n] and A = [A_1; …; A_n].
            Otherwise the nearest update of at most that rank, by a singular value decomposition of each layer's, which
            is exact from the sum of their ranks on. (PEFT's `svd` fails above the size of the smallest layer.)

    Raises:
        AdapterError: a name is unknown, or `into` is taken.
        ValueError: `rank` is below 0.
    """
    if rank < 0:
        raise ValueError(f"rank must be at least 0 (0 = as high as is exact), got {rank}")
    unknown = [name for name in names if name not in model.peft_config]
    if unknown or not names or into in model.peft_config:
        raise AdapterError(f"cannot merge {list(names)} into {into!r}: the model has {list(model.peft_config)}")
    _check_name(model, into)
    tuner: Any = model.base_model
    exact = f"{into}_exact" if rank else into
    tuner.add_weighted_adapter(list(names), [weight] * len(names), exact, combination_type="cat")
    if rank:
        _reduce_rank(model, exact, into, rank)
        model.delete_adapter(exact)
    activate(model, into)
    return model


def _reduce_rank(model: PeftModel, exact: str, into: str, rank: int) -> None:
    """Add the adapter `into`, whose update is the nearest to that of `exact` of at most this rank."""
    lora = copy.deepcopy(model.peft_config[exact])
    lora.r = lora.lora_alpha = min(rank, lora.r)
    lora.rank_pattern, lora.alpha_pattern = {}, {}
    attach(model, into, lora)
    for layer in model.modules():
        if not (isinstance(layer, LoraLayer) and exact in layer.lora_A):
            continue
        up, down = (getattr(layer, f"lora_{side}")[exact].weight.detach().double() for side in "BA")  # (O, R), (R, I)
        left, upper = torch.linalg.qr(layer.scaling[exact] * up)
        right, lower = torch.linalg.qr(down.T)
        first, values, last = torch.linalg.svd(upper @ lower.T)
        kept = min(lora.r, len(values))  # a layer may have fewer inputs or outputs
        for side, factor in (("B", (left @ first)[:, :kept] * values[:kept]), ("A", (last @ right.T)[:kept])):
            weight = getattr(layer, f"lora_{side}")[into].weight
            with torch.no_grad():
                weight.zero_()
                weight[: factor.shape[0], : factor.shape[1]] = factor


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


def check_trained(model: PeftModel) -> None:
    """Refuse a model of which more is trained than is saved: the LoRA matrices of its one active adapter.

    Raises:
        AdapterError: with names of what would be lost.
    """
    name = model.active_adapter
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if len(active := {each for layer in layers for each in layer.active_adapters}) > 1:
        raise AdapterError(
            f"the adapters {sorted(active)} are active at once, but only the LoRA matrices of one active adapter are "
            f"trained and saved here; choose it by adapters.activate(model, {name!r}, trainable=True)"
        )
    _check_saved(model, name, list(model.named_parameters()))


def _check_saved(model: PeftModel, name: str, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Refuse what an adapter's file leaves out of these parameters: those that are trained, and those of its name."""
    saved = {key for key, _ in adapter_parameters(model, name)}
    network = TERM_NETWORK.partition("{")[0]
    lost = [
        key
        for key, parameter in parameters
        if key not in saved and not key.startswith(network) and (parameter.requires_grad or name in key.split("."))
    ]
    if lost:
        raise AdapterError(
            f"{len(lost)} parameters would be lost ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}): only "
            "the LoRA matrices of one active adapter are trained and saved here. Make the adapter by "
            f"adapters.add_adapter, or freeze the rest by adapters.activate(model, {name!r}, trainable=True)"
        )


def attach(model: nn.Module, name: str, lora: LoraConfig, *, empty: bool = False) -> PeftModel:
    """`model` with a new, untrained adapter of this shape beside those that it has.

    Args:
        name: new, without dots, no part of `lora_`, and no part of a module's path, such as a layer's number: PEFT
            finds an adapter's weights by its name.
        empty: give it no values (the meta device): they are about to be read, and drawing them takes longer than that.

    Raises:
        AdapterError: the name is another.
    """
    _check_name(model, name)
    if isinstance(model, PeftModel):
        model.add_adapter(name, lora, low_cpu_mem_usage=empty)
        return model
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 by a deprecated name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return PeftModel(model, lora, adapter_name=name, low_cpu_mem_usage=empty)


def _check_name(model: nn.Module, name: str) -> None:
    parts = {part for path, _ in model.named_modules() for part in path.split(".")} | {"base_layer", "base_model"}
    if "." in name or name in "lora_" or name.startswith("lora_") or name in parts:
        raise AdapterError(
            "an adapter's name must be new, without dots, neither a part nor a continuation of 'lora_', "
            f"and no part of a module's path, as a layer's number is; got {name!r}"
        )


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
    halves = (torch.float16, torch.bfloat16)
    rounded = [parameter for _, parameter in adapter_parameters(model, name) if parameter.dtype in halves]
    if rounded:  # PEFT gives what it makes from nothing the type of the base
        for parameter in rounded:
            parameter.data = parameter.data.float()
        set_peft_model_state_dict(model, lora, adapter_name=name)


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

    Raises:
        FileExistsError: the folder holds something else than an adapter.
        AdapterError: the adapter is more than `load_adapter` reads, or more was trained than its LoRA matrices.
    """
    path = Path(folder)
    _check_readable(model, name)
    weights = adapter_weights(model, name)
    if not write:
        return path
    check_replaceable(path, (WEIGHTS, PEFT_CONFIG, INFO, STATISTICS, "README.md"), "an adapter")
    with atomic_folder(path) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        lora = model.peft_config[name]
        lora.base_model_name_or_path, lora.inference_mode = info.base_model, True
        lora.save_pretrained(str(temporary))
        write_json(temporary / STATISTICS, dict(statistics))
        write_info(temporary, info)
    return path


def _check_readable(model: PeftModel, name: str) -> None:
    """Refuse to write an adapter that `load_adapter` would refuse, or that is not all of what was trained."""
    lora: Any = model.peft_config[name]
    try:
        if lora.peft_type != "LORA":
            raise ValueError(f"peft_type is {lora.peft_type.value}")
        check_lora(lora)
    except ValueError as error:
        raise AdapterError(
            f"adapter {name!r} could not be loaded again: {error}; make it by adapters.add_adapter, or save it as "
            "PEFT's own (model.save_pretrained)"
        ) from error
    others = set(model.peft_config) - {name}  # which may be in training
    mine = [(key, value) for key, value in model.named_parameters() if not others & set(key.split("."))]
    _check_saved(model, name, mine)


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
    return read_adapter(model, path, name, trainable=trainable), info


def read_adapter(model: nn.Module, folder: Path, name: str, *, trainable: bool = False) -> PeftModel:
    """`load_adapter` without its checks; where the weights do not fit, the model is left as it was."""
    before, lora = active_adapter(model), read_lora(folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peft_model = attach(model, name, lora, empty=True)
    try:
        read_adapter_weights(peft_model, name, folder)
    except Exception:
        if isinstance(model, PeftModel):
            _take_back(peft_model, name, before)
        else:
            tuner: Any = peft_model.base_model
            tuner.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    activate(peft_model, name, trainable=trainable)
    return peft_model


def _take_back(model: PeftModel, name: str, before: str | None) -> None:
    """Remove an adapter that could not be filled, and run with what ran before."""
    model.delete_adapter(name)
    switch(model, before) if before else deactivate(model)


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
