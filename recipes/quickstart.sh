#!/usr/bin/env bash
# Install what is missing and run the main job end to end: learn LIBERO-Goal tasks one after another on a CPU.
# usage: recipes/quickstart.sh [--option value ...]     options as in `recipes/continual.py --help`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/setup.sh libero video
[ -t 2 ] || export TQDM_MININTERVAL=${TQDM_MININTERVAL:-15}   # a log file needs no smooth bars
exec .venv/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --num_cpu_threads_per_process "$(nproc)" --mixed_precision no --dynamo_backend no \
    recipes/continual.py recipes/configs/quickstart.yaml "$@"
