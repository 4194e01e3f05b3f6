"""A check that a policy looks at its image: a silent failure of several ports of OpenVLA is that it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .modeling_openvla import OpenVLAForActionPrediction
from .processing_openvla import build_prompt


@torch.no_grad()
def assert_policy_sees_image(model: Any, processor: Any, instruction: str = "open the drawer") -> None:
    """Raise unless a black and a white frame give different outputs.

    Args:
        model: an `OpenVLAForActionPrediction`, possibly inside a PEFT model.
        processor: its processor.
        instruction: any.

    Raises:
        RuntimeError: both frames give exactly the same output.
    """
    base = model if isinstance(model, OpenVLAForActionPrediction) else model.get_base_model()
    config = base.config
    _, height, width = processor.image_processor.input_sizes[0]
    training = model.training
    model.eval()
    outputs = []
    for level in (0, 255):  # one by one: the rows of a batch may round differently
        frames = [np.full((height, width, 3), level, np.uint8)] * config.num_images_in_input
        inputs = processor([build_prompt(instruction)], [frames]).to(base.device)
        if config.proprio_dim:
            inputs["proprio"] = torch.zeros(1, config.proprio_dim, device=base.device)
        output = model(**inputs)
        outputs.append(output.logits if output.predicted_actions is None else output.predicted_actions)
    model.train(training)
    if torch.equal(*outputs):
        raise RuntimeError(
            "The policy does not see its image: a black and a white frame give the same output. Check that the "
            "weights of the vision backbone and the projector were loaded."
        )
