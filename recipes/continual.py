"""Learn a stream of LIBERO tasks, one LoRA adapter after another: the whole loop, to read and to change.

    accelerate launch recipes/continual.py recipes/configs/quickstart.yaml [--option value ...]

The recipe is a YAML file of options, the command line overrides it, and --help explains every option. A plan is
printed before the start. A run that was stopped continues with the same command: what is finished is not repeated, and
a training goes on from its last checkpoint. Everything ends up in --output_dir; open its report/index.html.

`infovla train` does the same. This file is for those who want another loop: copy it, and change it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from infovla_peft import InfoVLATrainer
from infovla_peft.adapters import add_adapter
from infovla_peft.cli import run_command
from infovla_peft.command_options import split_recipe
from infovla_peft.config import load_recipe
from infovla_peft.progress import quiet_libraries, show_progress
from infovla_peft.stream import Stage, Stream


def main(argv: Sequence[str]) -> None:
    """Base, then for each stage: adapter, memory, rollouts of every task seen so far."""
    path, overrides = split_recipe(argv, "recipes/continual.py")
    config, training = load_recipe(path, overrides, prog="recipes/continual.py [RECIPE.yaml]", description=__doc__)
    quiet_libraries(loading_bars=config.base_model != "tiny")

    with Stream(config, training) as stream:  # opens the run's folder; a changed recipe is refused here
        say(stream, stream.plan)

        # Scripted demonstrations of every task, on fresh layouts: never from the initial states of the evaluation.
        stream.record()

        # Stage 0. `base_model: tiny` is built and trained here, all its parameters; a checkpoint is taken as it is.
        stream.learn_base()

        for stage in stream.stages:
            if stage.index > 0:
                stream.learn(stage, train_adapter)
            # A few trajectories of the stage's tasks are kept; from now on they are replayed.
            stream.remember(stage)
            # Roll out every task seen so far: one column of the success matrix, videos, and the report.
            stream.measure(stage)
            # With --analyse: what each stage has kept of the tasks before, as figures in the report; else nothing.
            if stage is stream.stages[-1]:
                stream.analyse()
            # With --push_to_hub: one commit with everything so far; nothing without it.
            stream.publish(stage)

        say(stream, stream.summary)


def train_adapter(stream: Stream, stage: Stage) -> None:
    """One stage: a new adapter learns the stage's tasks, held to what the frozen teacher made of the old ones."""
    training = stream.stage_training(stage)

    # The base, frozen, with the adapter of the stage before: where the new one starts, and perhaps the teacher.
    model, processor, normaliser = stream.load_base()
    model, previous = stream.load_previous(stage, model)

    # The new adapter, alone trainable.
    start_from = previous if training.adapter_init == "continue" else None
    model = add_adapter(model, stage.name, training, start_from=start_from)

    # Samples: a frame, its instruction, proprioception, and the chunk of actions that follows. The statistics are the
    # base's and stay so: normalisation per task would destroy what was learned.
    collator = stream.collator(model, processor, normaliser)
    samples = stream.samples(stage.tasks, model, collator)

    # Policy loss on current and replayed samples, plus the terms of the method on the replayed ones. The teacher runs
    # once, here at the beginning, over the memory: its features are the anchors.
    trainer = InfoVLATrainer(
        model,
        training,
        samples,
        collator,
        memory=stream.memory(),
        callbacks=stream.callbacks(stage),  # log.jsonl, for the report's curves
        **stream.past(stage, model, collator),  # which tasks came before, and which adapter learned them
    )
    show_progress(trainer, f"stage {stage.index}")
    trainer.train(resume_from_checkpoint=True)

    # adapter_model.safetensors, adapter_config.json, infovla.json, dataset_statistics.json: all `load_policy` needs.
    stream.save_adapter(model, stage, normaliser)


def say(stream: Stream, text: object) -> None:
    """Print once, however many processes there are."""
    if stream.run_folder.main_process:
        print(text() if callable(text) else text, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
