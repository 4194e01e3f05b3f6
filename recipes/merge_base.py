"""Write the newest adapter of a run into its base: one checkpoint, from which another stream starts.

    accelerate launch --mixed_precision bf16 recipes/continual.py recipes/configs/openvla_7b_libero_long_base.yaml
    python recipes/merge_base.py runs/openvla_7b_libero_long_base runs/openvla_7b_libero_long_base/merged

So a base that was learned from a checkpoint, on several tasks together, gets the place of the base stage of `B5-5N1`.
The statistics of the actions go along. Every layer is asked before and after whether it gives the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from infovla_peft import load_policy
from infovla_peft.cli import run_command
from infovla_peft.merging import save_merged


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, or a repository of the Hub")
    parser.add_argument("folder", type=Path, help="of the checkpoint: a new or an empty one")
    parser.add_argument(
        "--dtype", help="of the weights while they are merged, and of what is written: float32, bfloat16 (as the base)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: the CPU)")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> None:
    """Load, merge, write."""
    policy = load_policy(str(options.run), dtype=options.dtype, device=options.device)
    print(save_merged(policy.model, policy.processor, options.folder))


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(parse(sys.argv[1:]))))
