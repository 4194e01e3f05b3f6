"""What FSDP and DeepSpeed, which split the parameters between processes, do not do."""

from __future__ import annotations

import os

from .compilation import check_compilable
from .config import InfoVLAConfig
from .methods import METHODS


def is_sharded(args: InfoVLAConfig) -> bool:
    """Whether a training with these arguments, launched as this process was, splits its parameters."""
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(value.lower() in ("true", "1") for value in launched)


def check_engine(args: InfoVLAConfig, *, sharded: bool) -> None:
    """Raise a ValueError if the engine of a training cannot do what its options ask for."""
    method = METHODS[args.method]
    if sharded and (method.retrieves or method.consolidates):
        raise ValueError(
            f"method={args.method!r} looks at single parameters, so each process must hold all of them; "
            "launch with recipes/accelerate/ddp.yaml instead of FSDP or DeepSpeed"
        )
    if sharded and args.log_gradients:
        raise ValueError("log_gradients is not supported with FSDP or DeepSpeed: leave it out")
    if args.torch_compile:
        if sharded:
            raise ValueError("torch_compile is not supported with FSDP or DeepSpeed: train without it")
        check_compilable(args.device.type)
