"""One optimiser step of several methods. Run in one process, and by `accelerate launch` in two, it must do the same.

accelerate launch --config_file recipes/accelerate/ddp.yaml --mixed_precision no --num_processes 2 \\
    tests/two_processes.py <folder for results> <cases>
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from launcher import shard_on_cpu
from safetensors.torch import save_file
from tiny_policy import tiny_policy

from infovla_peft.adapters import add_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.distributed import is_sharded, whole
from infovla_peft.memory import ReplayMemory
from infovla_peft.trainer import InfoVLATrainer

BATCH = 10  # over all processes; each of two then holds 5, and an unequal number of replay samples
CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "er": {"method": "er"},
    "bank": {"method": "infovla", "cmi_mode": "infonce"},
    "batch": {"method": "infovla", "cmi_mode": "relational", "anchor_bank": 0, "rac_center": False},
    "paper": {"method": "infovla_paper"},
    "counterfactual": {"method": "infovla", "counterfactual_share": 0.9},
    "lwf": {"method": "lwf"},
    "vision": {"method": "er", "image_shift": 0, "cache_vision_features": True, "lora_targets": "q_proj,v_proj"},
    "accumulated": {"method": "infovla", "gradient_accumulation_steps": 2, "activation_checkpointing": True},
}


def one_step(case: str, folder: Path) -> None:
    """SGD with a learning rate of 1: the change of the parameters is the gradient."""
    options = CASES[case]
    policy = tiny_policy(layers=3)
    config = InfoVLAConfig(
        output_dir=str(folder / case), use_cpu=True, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0,
        lr_scheduler_type="constant", save_strategy="no", logging_steps=1, disable_tqdm=True, lora_r=4,
        lora_alpha=16, anchor_views=2, proprio_noise=0.05, replay_fraction=0.5,
        **{"image_shift": 2, "counterfactual_frames": 30, "lambda_rac": 0.1, "lambda_cmi": 0.1, **options},
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
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not is_sharded(trainer.model):
        sys.exit("nothing is sharded, so the comparison would show nothing of FSDP")
    after = {name: whole(parameter).detach() for name, parameter in model.named_parameters()}
    change = {name: after[name] - before[name] for name in after if name in before}
    change |= {name: whole(p).detach() - networks[name] for name, p in trainer._networks().items()}
    trainer.save_model(str(folder / case))
    if is_sharded(trainer.model):
        refuses_to_continue(trainer, folder / case)
    if config.process_index == 0:
        save_file({name: delta.contiguous() for name, delta in change.items()}, folder / f"{case}.safetensors")
        entry = {key: value for key, value in trainer.state.log_history[0].items() if key != "epoch"}
        (folder / f"{case}.json").write_text(json.dumps(entry))


def refuses_to_continue(trainer: InfoVLATrainer, checkpoint: Path) -> None:
    """Or end with an error: a checkpoint of a sharded model must not be continued."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except ValueError as error:
        if "under FSDP2 cannot be continued" in str(error):
            return
        raise
    sys.exit("a checkpoint of a sharded model was continued")


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE") != "2":
        sys.exit("this must run in two processes, or the comparison shows nothing")
    shard_on_cpu()
    for name in sys.argv[2:]:
        one_step(name, Path(sys.argv[1]))
