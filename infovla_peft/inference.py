"""A policy: images, an instruction and proprioception in, a chunk of un-normalised actions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .data.images import central_crop
from .data.normalisation import Normaliser
from .models.openvla import build_prompt

Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]] | Mapping[str, NDArray[np.uint8]]


class Policy:
    """A model with everything that turns observations into actions. `load_policy` makes one.

    Args:
        model: an OpenVLA, with its adapter if it has one; it is switched to evaluation mode.
        processor: its processor.
        normaliser: the statistics it was trained with.
        cameras: names of the images the model reads, in its order.
        instruction: used where `act` is given none.
        recipe: how it was trained and evaluated (the resolved configuration); empty for a plain checkpoint.
        crop: show the model the central crop of each image, see `data.images.central_crop`; None = as the recipe says.
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
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.normaliser = normaliser
        self.cameras = tuple(cameras)
        self.instruction = instruction
        self.recipe = dict(recipe or {})
        self.crop = bool(self.recipe.get("center_crop")) if crop is None else crop

    def act(self, images: Images, instruction: str | None = None, proprio: ArrayLike | None = None) -> NDArray[Any]:
        """The next actions.

        Args:
            images: upright uint8 RGB (H, W, 3): one, or one per camera, in a sequence or by camera name.
            instruction: e.g. "turn on the stove"; may be left out if the policy was loaded for one task.
            proprio: raw state, (8,) in LIBERO: hand position (m), axis-angle (rad), finger positions (m). Needed
                where the model has proprioception, not used elsewhere.

        Returns:
            (chunk, action_dim) un-normalised actions in the model's convention, as OpenVLA's `predict_action` gives
            them: gripper 1 = open, 0 = close. `policy.normaliser.to_env_action` turns them into LIBERO's.

        Raises:
            ValueError: an image, the instruction or the proprioception is missing or of another shape.
        """
        instruction = self.instruction if instruction is None else instruction
        if instruction is None:
            raise ValueError("the policy was loaded for no single task: say which by act(images, instruction, ...)")
        chunk: NDArray[Any] = self.act_batch([images], [instruction], None if proprio is None else [proprio])[0]
        return chunk

    def act_batch(
        self, images: Sequence[Images], instructions: Sequence[str], proprio: Sequence[ArrayLike] | None = None
    ) -> NDArray[Any]:
        """`act` for several observations in one forward; returns (batch, chunk, action_dim)."""
        rows = [self._in_order(row) for row in images]
        if self.crop:
            side = self.processor.image_processor.input_sizes[0][-1]
            rows = [[central_crop(image, side) for image in row] for row in rows]
        inputs = self.processor(
            [build_prompt(instruction) for instruction in instructions], rows, padding=True, return_tensors="pt"
        )
        config, device, dtype = self._config, self.model.device, self.model.dtype
        state = None
        if config.proprio_dim:
            state = self._normalised_state(proprio, len(rows)).to(device, dtype)
        with torch.inference_mode():
            actions = self._bare_model.predict_action(
                inputs["input_ids"].to(device),
                inputs["attention_mask"].to(device),
                inputs["pixel_values"].to(device, dtype),
                unnorm_key=self.normaliser.key,
                proprio=state,
            )
        chunk = config.num_actions_chunk if config.decoding == "parallel" else 1
        return np.asarray(actions).reshape(len(rows), chunk, -1)

    @property
    def _bare_model(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def _config(self) -> Any:
        return self._bare_model.config

    def _in_order(self, images: Images) -> list[NDArray[np.uint8]]:
        if isinstance(images, Mapping):
            if missing := [camera for camera in self.cameras if camera not in images]:
                raise ValueError(f"the policy sees {list(self.cameras)}, but there is no image of {missing}")
            return [images[camera] for camera in self.cameras]
        row = [images] if isinstance(images, np.ndarray) and images.ndim == 3 else list(images)
        if len(row) != len(self.cameras):
            raise ValueError(f"the policy sees {list(self.cameras)}: give {len(self.cameras)} images, not {len(row)}")
        return row

    def _normalised_state(self, proprio: Sequence[ArrayLike] | None, batch: int) -> torch.Tensor:
        expected = (batch, self._config.proprio_dim)
        state = np.asarray([] if proprio is None else proprio, dtype=np.float32)
        if state.shape != expected:
            raise ValueError(
                f"the policy needs proprioception of {expected[1]} numbers per observation (hand position, "
                f"axis-angle, fingers), got an array of shape {state.shape[1:] if proprio is not None else None}"
            )
        return torch.from_numpy(self.normaliser.normalise_proprio(state))
