"""One optimiser step of several methods. Run in one process, and by `accelerate launch` in two, it must do the same.

accelerate launch --multi_gpu --num_processes 2 tests/two_processes.py <folder for results>
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_policy import tiny_policy

from infovla_peft.adapters import add_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.memory import ReplayMemory
from infovla_peft.trainer import InfoVLATrainer

BATCH = 10  # over all processes; each of two then holds 5, and an unequal number of replay samples
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "er": {"method": "er"},
    "bank": {"method": "infovla", "cmi_mode": "infonce"},
    "batch": {"method": "infovla", "cmi_mode": "relational", "anchor_bank": 0},
    "paper": {"method": "infovla_paper"},
    "counterfactual": {"method": "infovla", "counterfactual_share": 0.5, "counterfactual_frames": 30},
    "lwf": {"method": "lwf", "counterfactual_frames": 30},
    "accumulated": {"method": "infovla", "gradient_accumulation_steps": 2, "activation_checkpointing": True},
}


def one_step(case: str, folder: Path) -> None:
    """SGD with a learning rate of 1: the change of the parameters is the gradient."""
    options = CASES[case]
    policy = tiny_policy(layers=3)
    config = InfoVLAConfig(
        output_dir=str(folder / case), use_cpu=True, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0,
        lr_scheduler_type="constant", save_strategy="no", logging_steps=1, disable_tqdm=True, lora_r=4,
        lora_alpha=16, image_shift=2, anchor_views=2, proprio_noise=0.05, replay_fraction=0.5, **options,
    )  # fmt: skip
    config.per_device_train_batch_size = BATCH // config.world_size
    model, dataset, memory = policy.model, policy.dataset, None
    if case != "base":
        model = add_adapter(model, "one", config)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, 0, 0.1)  # away from the teacher
        memory = ReplayMemory().add(policy.task("open_the_drawer")).add(policy.task("turn_on_the_stove"))
        dataset = dataset.like(policy.task("put_the_bowl_on_the_plate"))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = InfoVLATrainer(model, config, dataset, policy.collator, memory=memory)
    networks = {name: p.detach().clone() for name, p in trainer._networks().items()}
    trainer.train()
    change = {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}
    change |= {name: p.detach() - networks[name] for name, p in trainer._networks().items()}
    if config.process_index == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: delta.contiguous() for name, delta in change.items()}, folder / f"{case}.safetensors")
        entry = {key: value for key, value in trainer.state.log_history[0].items() if key != "epoch"}
        (folder / f"{case}.json").write_text(json.dumps(entry))


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE") != "2":
        sys.exit("this must run in two processes, or the comparison shows nothing")
    for name in CASES:
        one_step(name, Path(sys.argv[1]))
