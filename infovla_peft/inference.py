"""A policy: images, an instruction and proprioception in, a chunk of un-normalised actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from .adapters import base_model, mixed_adapters
from .data.images import central_crop
from .data.normalisation import Normaliser
from .models.openvla import build_prompt
from .models.openvla.processing_openvla import ImageLike, rgb_pixels
from .policy import chunk_length

if TYPE_CHECKING:
    from .library import AdapterLibrary

Images = ImageLike | Sequence[ImageLike] | Mapping[str, ImageLike]


class Policy:
    """A model with everything that turns observations into actions. `load_policy` makes one.

    Args:
        model: an OpenVLA, with its adapter if it has one; it is switched to evaluation mode.
        processor: its processor.
        normaliser: the statistics it was trained with.
        cameras: names of the images the model reads, in its order.
        instruction: used where `act` is given none.
        recipe: how it was trained and evaluated (the resolved configuration); of an adapter that does not say so, its
            suite alone; empty for a plain checkpoint.
        crop: show the model the central crop of each image, see `data.images.central_crop`; None = as the recipe says.
        prompt: what the model reads, with {instruction} in it; "" for the package's own.
        library: the adapters that `use` and `task=` choose from.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        normaliser: Normaliser,
        *,
        cameras: Sequence[str] = ("agentview",),
        instruction: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        crop: bool | None = None,
        prompt: str = "",
        library: AdapterLibrary | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.normaliser = normaliser
        self.cameras = tuple(cameras)
        self.instruction = instruction
        self.recipe = dict(recipe or {})
        self.crop = bool(self.recipe.get("center_crop")) if crop is None else crop
        self.prompt = prompt
        self._library = library

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks that `use` and `act(..., task=...)` know, in the order in which they were learned."""
        return list(self._library.tasks) if self._library else []

    def tasks_after(self, stage: int | None = None) -> list[str]:
        """Names of all tasks learned by the end of a stage (0 is the base, None the last one), in that order."""
        return self._library.tasks_after(stage) if self._library else []

    def use(self, task: str | None = None, *, stage: int | None = None) -> Policy:
        """Act with another adapter from now on: the one that learned `task`, or the policy after `stage`.

        An adapter that is not on the model yet is read first, as in `load_policy`; from then on, switching moves no
        weights and takes milliseconds. `task` also becomes `act`'s instruction.

        Args:
            task: name or instruction of a task.
            stage: 1, 2, …; 0 is the base alone.

        Returns:
            The policy itself.

        Raises:
            ValueError: no such task or stage, or the policy was loaded without adapters.
            AdapterError: an adapter was merged into the base that it needs; see `AdapterLibrary.check_model`.
        """
        if task is None and stage is None:
            raise ValueError("say which: use(task) or use(stage=...)")
        library = self._need_library()
        adapter, instruction = library.choose(task, stage)
        self.model = library.switch(self.model, adapter).eval()
        self.instruction = instruction if task is not None else None
        return self

    def act(
        self,
        images: Any,
        instruction: str | None = None,
        proprio: Any = None,
        *,
        task: str | Sequence[str] | None = None,
    ) -> NDArray[Any]:
        """The next actions.

        Args:
            images: upright uint8 RGB (H, W, 3), an array or a tensor, or a PIL image: one, or one per camera, in a
                sequence or by camera name.
            instruction: e.g. "turn on the stove"; may be left out if the policy was loaded for one task. With several
                tasks it is that of all of them; `act_batch` takes one for each.
            proprio: raw state, (8,) in LIBERO: hand position (m), axis-angle (rad), finger positions (m). Needed
                where the model has proprioception, not used elsewhere.
            task: name or instruction of a task: act with the adapter that learned it, whatever is in use. A sequence:
                `images` and `proprio` hold one entry per task, and one forward serves them all, each row with its own
                adapter.

        Returns:
            (chunk, action_dim) un-normalised actions in the model's convention, as OpenVLA's `predict_action` gives
            them: gripper 1 = open, 0 = close. `policy.normaliser.to_env_action` turns them into LIBERO's. Of a
            sequence of tasks: (tasks, chunk, action_dim).

        Raises:
            ValueError: an image, the instruction or the proprioception is missing or of another shape; an unknown
                task.
            AdapterError: an adapter was merged into the base that `task` needs; see `AdapterLibrary.check_model`.

        Example:
            >>> policy.act([image, image], proprio=[state, state],  # doctest: +SKIP
            ...            task=["turn on the stove", "open the top drawer"]).shape
            (2, 8, 7)
        """
        if not isinstance(instruction, str | None):
            raise ValueError(f"`instruction` must be one text, got {instruction!r:.80}; act_batch takes several")
        if task is not None and not isinstance(task, str):
            tasks = _listed(task, "tasks")
            texts = None if instruction is None else [instruction] * len(tasks)
            return self.act_batch(images, texts, None if proprio is None else _listed(proprio, "proprio"), tasks=tasks)
        instruction = self.instruction if instruction is None and task is None else instruction
        if instruction is None and task is None:
            raise ValueError("the policy was loaded for no single task: say which by act(images, instruction, ...)")
        chunk: NDArray[Any] = self.act_batch(
            [images],
            None if instruction is None else [instruction],
            None if proprio is None else [proprio],
            tasks=None if task is None else [task],
        )[0]
        return chunk

    def act_batch(
        self,
        images: Sequence[Images],
        instructions: Sequence[str] | None = None,
        proprio: Sequence[ArrayLike] | None = None,
        *,
        tasks: Sequence[str] | None = None,
    ) -> NDArray[Any]:
        """`act` for several observations in one forward; returns (batch, chunk, action_dim).

        Args:
            instructions: one per observation; None for those of `tasks`.
            tasks: one per observation: each is acted on by the adapter that learned its task.

        Raises:
            As `act`.
        """
        images = _listed(images, "images")
        instructions = None if instructions is None else _listed(instructions, "instructions")
        tasks = None if tasks is None else _listed(tasks, "tasks")
        adapters: Any = nullcontext()
        if tasks is not None:
            library = self._need_library()
            library.check_model(self.model)
            needed, names, known = library.mixed(tasks)
            for adapter in needed:
                self.model = library.load_inactive(self.model, adapter)
            self.model.eval()
            instructions = known if instructions is None else instructions
            adapters = mixed_adapters(self.model, names)
        if instructions is None or not len(images) == len(instructions) == len(tasks or images):
            given = f"{len(images)} observations, {len(instructions or ())} instructions, {len(tasks or ())} tasks"
            raise ValueError(f"a batch needs one instruction or one task per observation, got {given}")
        if empty := [text for text in instructions if not isinstance(text, str) or not text.strip()]:
            raise ValueError(f"an instruction must be a text that says what to do, got {empty[0]!r:.80}")
        rows = [self._in_order(row) for row in images]
        if self.crop:
            side = self.processor.image_processor.input_sizes[0][-1]
            rows = [[central_crop(image, side) for image in row] for row in rows]
        inputs = self.processor(
            [build_prompt(instruction, self.prompt) for instruction in instructions],
            rows,
            padding=True,
            return_tensors="pt",
        )
        config, device, dtype = self._config, self.model.device, self.model.dtype
        state = None
        if config.proprio_dim:
            state = self._normalised_state(proprio, len(rows)).to(device, dtype)
        with torch.inference_mode(), adapters:
            actions = self._bare_model.predict_action(
                inputs["input_ids"].to(device),
                inputs["attention_mask"].to(device),
                inputs["pixel_values"].to(device, dtype),
                unnorm_key=self.normaliser.key,
                proprio=state,
            )
        return np.asarray(actions).reshape(len(rows), chunk_length(config), -1)

    def _need_library(self) -> AdapterLibrary:
        if self._library is None:
            raise ValueError("the policy was loaded without adapters; load_policy(run or repository) knows its tasks")
        return self._library

    @property
    def _bare_model(self) -> Any:
        return base_model(self.model)

    @property
    def _config(self) -> Any:
        return self._bare_model.config

    def _in_order(self, images: Images) -> list[NDArray[np.uint8]]:
        if isinstance(images, Mapping):
            if missing := [camera for camera in self.cameras if camera not in images]:
                raise ValueError(f"the policy sees {list(self.cameras)}, but there is no image of {missing}")
            return [rgb_pixels(images[camera]) for camera in self.cameras]
        one = isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4)
        row: list[Any] = [images] if one else _listed(images, f"the images of {list(self.cameras)}")
        if len(row) != len(self.cameras):
            raise ValueError(f"the policy sees {list(self.cameras)}: give {len(self.cameras)} images, not {len(row)}")
        return [rgb_pixels(image) for image in row]

    def _normalised_state(self, proprio: Sequence[ArrayLike] | None, batch: int) -> torch.Tensor:
        expected = (batch, self._config.proprio_dim)
        try:
            state = np.asarray([] if proprio is None else proprio, dtype=np.float32)
        except ValueError:
            state = None
        if state is None or state.shape != expected:
            rows = f"{batch} row{'s' * (batch != 1)} of {expected[1]} numbers"
            raise ValueError(
                f"the policy needs proprioception of {expected[1]} numbers per observation (hand position, "
                f"axis-angle, fingers), here {rows}; got {_shape_in_words(proprio, state)}"
            )
        if not np.isfinite(state).all():
            raise ValueError(
                f"the proprioception holds {np.count_nonzero(~np.isfinite(state))} numbers that are NaN or infinite; "
                "give the state as the robot measured it"
            )
        return torch.from_numpy(self.normaliser.normalise_proprio(state))


def _shape_in_words(given: Any, array: NDArray[Any] | None) -> str:
    """What was given for rows of numbers; `array` is None where NumPy makes none of it."""
    if given is None:
        return "none"
    if array is not None:
        count = len(array) if array.ndim == 2 else None
        return f"{count} row{'s' * (count != 1)} of {array.shape[1]}" if count else f"an array of shape {array.shape}"
    rows = [row for row in given if (row.ndim if isinstance(row, np.ndarray | Tensor) else not np.isscalar(row))]
    lengths = {len(row) for row in rows}
    return f"rows of {' and '.join(map(str, sorted(lengths)))}" if len(lengths) > 1 else "what is no array of numbers"


def _listed(values: Any, what: str) -> list[Any]:
    """The entries of a sequence; a text is none, whose letters would be taken for them."""
    try:
        if isinstance(values, str | Mapping):
            raise TypeError
        return list(values)
    except TypeError:
        raise ValueError(f"{what} must be given in a sequence, one each, got {values!r:.80}") from None
