"""What a checkpoint folder of OpenVLA or OpenVLA-OFT holds beside the weights that transformers loads."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_openvla import OpenVLAConfig

# Submodules that OpenVLA-OFT stores in files of their own.
COMPONENTS = ("action_head", "proprio_projector", "vision_backbone")
_IMAGES = "num_images_in_input"
# OpenVLA-OFT takes these from words on its command line and saves none of them; prismatic/vla/constants.py.
# Numbers of an action and of proprioception -> robot, actions of a chunk, what becomes -1 and 1.
_ROBOTS = {
    (7, 8): ("LIBERO", 8, "bounds_q99"),
    (14, 14): ("ALOHA", 25, "bounds"),
    (7, 7): ("Bridge", 5, "bounds_q99"),
    (7, 0): ("LIBERO without proprioception", 8, "bounds_q99"),
    (14, 0): ("ALOHA without proprioception", 25, "bounds"),
}
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that say where the files of a checkpoint lie."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if name in kwargs}


def read_config(path: str, kwargs: dict[str, Any]) -> tuple[OpenVLAConfig, dict[str, Any]]:
    """The configuration of a checkpoint and the arguments that are none of its fields.

    Where `config.json` does not say how the model decodes, it is a file of the original code; the separate files of
    OpenVLA-OFT then say it, and their shapes say of which of its robots they are. How many images such a model reads
    nothing says: `images` does, among the arguments.

    Of the Hub, all is read of one commit, the configuration's `_commit_hash`, and the arguments name it as `revision`.

    Raises:
        FileNotFoundError: the folder does not exist or has no `config.json`.
        ValueError: the checkpoint is of another model type, or of a robot that OpenVLA-OFT does not know.
    """
    folder = Path(path)
    where = os.path.join(path, inside) if (inside := kwargs.get("subfolder")) else path
    if folder.is_dir() and not (Path(where) / "config.json").is_file():
        raise FileNotFoundError(f"'{where}' holds no config.json, so it is no OpenVLA checkpoint folder.")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"There is no folder '{path}'; give a checkpoint folder or a hub id like 'user/name'.")
    images = kwargs.get("images")
    kwargs = {name: value for name, value in kwargs.items() if name != "images"}
    commit = None if folder.is_dir() else _commit_of(path, kwargs)
    if commit is not None:
        kwargs["revision"] = commit
    try:
        raw, _ = OpenVLAConfig.get_config_dict(path, **hub_arguments(kwargs))
        broken = None if isinstance(raw, dict) else "it holds no object"
    except (AttributeError, TypeError, ValueError) as error:
        raw, broken = {}, str(error)
    except OSError as error:
        if not folder.is_dir():
            raise
        raw, broken = {}, str(error)
    if broken is not None:
        raise ValueError(f"the config.json of '{where}' is damaged ({broken:.300}); copy it again.")
    if raw.get("model_type") != "openvla":
        raise ValueError(
            f"'{where}' is no OpenVLA checkpoint: the model_type of its config.json is {raw.get('model_type')!r}, not "
            "'openvla'."
        )
    if "decoding" not in raw and "decoding" not in kwargs:
        found = _fields_of_components(path, find_components(path, kwargs), {**raw, **kwargs})
        if found and images is not None and _IMAGES not in raw:
            found[_IMAGES] = images
        kwargs = {**found, **kwargs}
    # The model's to read: a configuration takes "auto" for the name of a type.
    own = {name: kwargs[name] for name in ("dtype", "torch_dtype") if name in kwargs}
    fields = {name: value for name, value in kwargs.items() if name not in own}
    config, unused = OpenVLAConfig.from_pretrained(path, return_unused_kwargs=True, **fields)
    config.check()
    config._commit_hash = commit
    return config, {**hub_arguments(kwargs), **unused, **own}


def complete_config(config: OpenVLAConfig, path: str, kwargs: dict[str, Any]) -> OpenVLAConfig:
    """A copy of a configuration that was given, with what the files of OpenVLA-OFT add to a plain one.

    transformers' Auto classes read `config.json` alone, and of the original's folders that says nothing of them. A
    configuration that decodes in parallel is left as it is, and one for a `config.json` that says how it decodes.

    Raises:
        ValueError: see `read_config`.
    """
    config = copy.deepcopy(config)
    if config.decoding != "autoregressive":
        return config
    raw = _raw_config(path, kwargs)
    if raw is None or "decoding" in raw:  # without one there, the given configuration is all that is said
        return config
    fields = ("action_dim", "num_actions_chunk", "action_normalization", _IMAGES)
    changed = {name: value for name in fields if (value := getattr(config, name)) != getattr(OpenVLAConfig, name)}
    found = _fields_of_components(path, find_components(path, kwargs), {**raw, **changed})
    if found and kwargs.get("images") is not None and not {_IMAGES} & {*raw, *changed}:
        found[_IMAGES] = kwargs["images"]
    for name, value in found.items():
        setattr(config, name, value)
    config.check()
    return config


def _raw_config(path: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """`config.json` as it is, None where it cannot be read."""
    try:
        raw, _ = OpenVLAConfig.get_config_dict(path, **hub_arguments(kwargs))
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None


def _commit_of(path: str, kwargs: dict[str, Any]) -> str | None:
    """The commit that a Hub id means now, or what the cache knows of it; None if that cannot be told."""
    try:
        return extract_commit_hash(cached_file(path, "config.json", **hub_arguments(kwargs)), None)
    except OSError:  # what is read next says it in its own words
        return None


def says_images(config: OpenVLAConfig, path: str, kwargs: dict[str, Any]) -> bool:
    """Whether a checkpoint tells how many images it reads: plain OpenVLA one, and what this package has saved."""
    return config.decoding != "parallel" or _IMAGES in OpenVLAConfig.get_config_dict(path, **hub_arguments(kwargs))[0]


def _fields_of_components(path: str, files: dict[str, Path], said: Mapping[str, Any]) -> dict[str, Any]:
    """What the files of OpenVLA-OFT say of the configuration; `said`: the fields that it has already."""
    fields: dict[str, Any] = {}
    if "action_head" in files:
        head = _load_component(files["action_head"])
        if "model.fc2.weight" not in head or head["model.fc2.weight"].dim() != 2:
            raise ValueError(f"'{files['action_head']}' is no L1 regression head; diffusion heads are not supported.")
        fields |= {"decoding": "parallel", "action_head": "l1", "action_dim": len(head["model.fc2.weight"])}
    if "proprio_projector" in files:
        projector = _load_component(files["proprio_projector"])
        if "fc1.weight" not in projector or projector["fc1.weight"].dim() != 2:
            raise ValueError(
                f"'{files['proprio_projector']}' is no proprio projector: it lacks the matrix fc1.weight."
            )
        fields |= {"decoding": "parallel", "proprio_dim": projector["fc1.weight"].shape[1]}
    if "vision_backbone" in files:
        fields |= {"decoding": "parallel", "use_film": True}
    return {**_fields_of_robot(path, fields, said), **fields} if fields else {}


def _fields_of_robot(path: str, found: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of the robot whose actions and proprioception have these sizes, but for those already said."""
    action, proprio = found.get("action_dim", said.get("action_dim")), found.get("proprio_dim", 0)
    constants = {
        sizes: {"action_dim": sizes[0], "num_actions_chunk": chunk, "action_normalization": bounds}
        for sizes, (_, chunk, bounds) in _ROBOTS.items()
    }
    # Without a file of the head, which writes tokens then, nothing says the size of an action.
    fitting = [sizes for sizes in constants if sizes[1] == proprio and action in (None, sizes[0])]
    if fitting:
        return {name: value for name, value in constants[fitting[0]].items() if name not in said}
    if {"num_actions_chunk", "action_normalization"} <= set(said):
        return {}
    known = ", ".join(f"{name} {sizes[0]} and {sizes[1]}" for sizes, (name, _, _) in _ROBOTS.items())
    raise ValueError(
        f"'{path}' is an OpenVLA-OFT checkpoint with {action or 'unknown'} numbers in an action and {proprio} of "
        f"proprioception, which no robot of the original has ({known}), so nothing says how long its action chunks "
        "are and how its actions are normalised. Write num_actions_chunk and action_normalization ('bounds_q99' or "
        "'bounds') into its config.json."
    )


def find_components(path: str, kwargs: dict[str, Any]) -> dict[str, Path]:
    """The files `<component>--*.pt` of a checkpoint, by component.

    Raises:
        ValueError: several files of one component.
    """
    folder, hub = Path(path), hub_arguments(kwargs)
    inside = hub.pop("subfolder", "")
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=[(PurePosixPath(inside) / "*--*.pt").as_posix()], **hub))
    folder = folder / inside
    found: dict[str, Path] = {}
    for component in COMPONENTS:
        files = sorted(folder.glob(f"{component}--*.pt"))
        if len(files) > 1:
            raise ValueError(
                f"'{folder}' holds several {component} files ({', '.join(file.name for file in files)}); keep one."
            )
        if files:
            found[component] = files[0]
    return found


def _load_component(file: Path) -> dict[str, Tensor]:
    """The tensors of a `.pt` file.

    Raises:
        ValueError: it holds anything else. torch's own message would advise to run what it holds.
    """
    refused = f"'{file}' is no state dict of tensors (it may hold code); it is not loaded: get it again."
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # reading garbage raises whatever its bytes happen to mean
        raise ValueError(refused) from None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ValueError(refused)
    # Saved out of DistributedDataParallel, every name starts with "module.".
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_components(model: Any, path: str, missing: set[str], kwargs: dict[str, Any]) -> set[str]:
    """Fill the submodules that the files of OpenVLA-OFT hold, if weights are missing; names of the filled ones."""
    loaded: set[str] = set()
    for component, file, state in _states_of_components(path, missing, kwargs):
        module: nn.Module = getattr(model, component)
        try:
            module.load_state_dict(state)
        except (RuntimeError, LookupError) as error:
            raise ValueError(f"'{file}' does not fit the configuration: {error}") from error
        loaded |= {f"{component}.{name}" for name in state}
    return loaded


def component_tensors(path: str, missing: set[str], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """What `load_components` fills a model with that lacks the weights `missing`, by their names in the model."""
    return {
        f"{component}.{name}": value
        for component, _, state in _states_of_components(path, missing, kwargs)
        for name, value in state.items()
    }


def _states_of_components(
    path: str, missing: set[str], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Path, dict[str, Tensor]]]:
    components = {name.split(".", 1)[0] for name in missing} & set(COMPONENTS)
    for component, file in (find_components(path, kwargs) if components else {}).items():
        if component not in components:
            continue
        state = _load_component(file)
        if component == "vision_backbone":
            try:
                state = _plain_vision_state(state)
            except (RuntimeError, LookupError, ZeroDivisionError) as error:
                raise ValueError(f"'{file}' does not fit the configuration: {error}") from error
        yield component, file, state


@contextmanager
def clear_loading_errors(path: str) -> Iterator[None]:
    """Name the checkpoint in errors of its files; drop transformers' load report, which `check_loaded` replaces."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_no_report(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_no_report)
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"A weight file of '{path}' is damaged or truncated ({error}); copy it again.") from error
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise FileNotFoundError(
            f"'{path}' lacks its weights in the safetensors format, and others are not loaded, as they may hold code "
            f"({str(error).splitlines()[0]:.300}); copy it again, or get it in that format"
        ) from error
    finally:
        logger.removeFilter(is_no_report)


def check_loaded(path: str, info: dict[str, Any]) -> None:
    """Raise a ValueError that names all weights which were missing, superfluous or of another shape."""
    problems = {
        "lacks": sorted(info["missing_keys"]),
        "holds, beyond what its configuration asks for,": sorted(info["unexpected_keys"]),
        "has other shapes (stored, expected) of": [
            f"{name} {tuple(stored)} {tuple(expected)}" for name, stored, expected in sorted(info["mismatched_keys"])
        ],
    }
    found = [f"{verb} {len(names)} weight(s): {', '.join(names)}" for verb, names in problems.items() if names]
    if found:
        raise ValueError(
            f"The checkpoint '{path}' {'; it '.join(found)}. Check that the folder is complete and that its "
            "config.json belongs to it."
        )


def _plain_vision_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and weights of OpenVLA-OFT's FiLM file as this package's: wrappers peeled off, LoRA merged.

    The original's LoRA has rank r and alpha min(r, 16).
    """
    state = {name.removeprefix("vision_backbone.").replace(".block.", "."): value for name, value in state.items()}
    plain = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if ".lora_A." not in name:
            continue
        up = state[name.replace(".lora_A.", ".lora_B.")]
        target = f"{name.split('.lora_A.')[0]}.weight"
        rank = len(down)
        delta = up.flatten(1).float() @ down.flatten(1).float() * (min(rank, 16) / rank)
        plain[target] = (plain[target].float() + delta.view_as(plain[target])).to(plain[target].dtype)
    return plain


def read_statistics(path: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """`dataset_statistics.json` of a checkpoint, None if it has none.

    Raises:
        ValueError: the file is no JSON.
    """
    file = cached_file(
        path,
        "dataset_statistics.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_arguments(kwargs),
    )
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{file}' is damaged ({error}); copy it again.") from error


def known_statistics(path: str, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """What will be the model's `norm_stats`, of the Hub without its weights; None of what is no OpenVLA.

    Raises:
        ValueError: see `read_statistics`.
    """
    raw = _raw_config(path, kwargs)
    if raw is None or raw.get("model_type") != OpenVLAConfig.model_type:
        return None  # loading says why, in its own words
    statistics = read_statistics(path, kwargs)
    described = (raw.get("norm_stats") if statistics is None else statistics) or {}
    return described if isinstance(described, dict) else None
