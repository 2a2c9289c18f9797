"""Resuming a run: the locks of its folders, its newest checkpoint, and the command that resumes it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lora_dpo_jax.checkpoints.store import Checkpoints
from lora_dpo_jax.places import is_within
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.run_lock import RunLock
from lora_dpo_jax.processes.signals import StoppedBySignalError
from lora_dpo_jax.runs.learner import Learner
from lora_dpo_jax.training.loop import TrainerConfig


@contextmanager
def run_locks(trainer: TrainerConfig, run_id: str) -> Iterator[None]:
    """While the block runs, no other run works in this run's folder, or in the folder of its checkpoints."""
    run_dir = trainer.run_dir(run_id)
    checkpoints = trainer.checkpointer.folder(run_dir, run_id)
    with ExitStack() as locks:
        if is_first_process():
            locks.enter_context(RunLock(run_dir, run_id))
            if not is_within(str(checkpoints), run_dir):
                locks.enter_context(RunLock(checkpoints, run_id))
        yield


def restore(
    checkpoints: Checkpoints, learner: Learner, num_steps: int, *, kept: Any = None, wanted: bool | None
) -> tuple[int, dict[str, Any], Any]:
    """Gives the learner the state of the newest checkpoint, if there is one.

    Returns (its step, its notes, the arrays that it keeps besides: a tree like `kept`, or None if it has none).
    """
    found = checkpoints.restore(learner.state.trained, kept=kept, wanted=wanted)
    if found is None:
        return 0, {}, None
    if found.step > num_steps:
        raise ValueError(
            f"{checkpoints.folder} holds a checkpoint of step {found.step}, but the run has only {num_steps} steps: "
            "raise trainer.num_train_steps or num_train_epochs, or choose another trainer.id"
        )
    learner.state = learner.state.with_trained(found.arrays)
    return found.step, found.notes, found.kept


@contextmanager
def saying_how_to_resume(trainer: TrainerConfig, run_id: str) -> Iterator[None]:
    """While the block trains, adds to an interruption the settings with which the same command resumes the run."""
    try:
        yield
    except StoppedBySignalError as interruption:
        if trainer.id is None:
            interruption.resume_with += ["--trainer.id", run_id]
        if trainer.load_checkpoint is False:
            interruption.resume_with += ["--trainer.load_checkpoint", "true"]
        raise
