"""`infovla train`: the main job."""

from __future__ import annotations

from collections.abc import Sequence

from ..command_options import split_recipe

_DRY_RUN = (
    "The recipe may be named as --config RECIPE.yaml, too. With --dry-run the plan is printed: stages, tasks, steps, "
    "rollouts, about how long; and nothing is written."
)


def train(argv: Sequence[str], *, prog: str = "infovla train") -> None:
    """The main job, from a recipe and its overrides."""
    import torch

    from ..config import load_recipe
    from ..preflight import check_batches, check_recipe
    from ..progress import quiet_libraries
    from ..stream import Stream

    dry_run = bool({"--dry-run", "--dry_run"} & set(argv))  # no field of a recipe: it is not kept with the run
    argv = [argument for argument in argv if argument not in ("--dry-run", "--dry_run")]
    recipe, overrides = split_recipe(argv, prog)
    if dry_run and not torch.cuda.is_available():
        overrides += ["--use_cpu=true", "--bf16=false", "--fp16=false"]  # a plan needs no device
    config, training = load_recipe(
        recipe, overrides, prog=f"{prog} [RECIPE.yaml]", description=f"{train.__doc__}\n\n{_DRY_RUN}"
    )
    quiet_libraries(loading_bars=config.base_model != "tiny")
    if dry_run:
        planned = Stream(config, training)
        check_recipe(planned)
        if training.process_index != 0:
            return
        print(planned.plan())
        try:
            check_batches(planned)
        except ValueError as error:
            print(f"note: in {training.world_size} process(es), {error}")
        return
    with Stream(config, training) as stream:
        if stream.run_folder.main_process:
            print(stream.plan(), flush=True)
        stream.run()
        if stream.run_folder.main_process:
            print(stream.summary())
