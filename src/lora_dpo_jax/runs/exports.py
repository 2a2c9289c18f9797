"""The adapter and the merged model, at the paths that are set: at the end, and on the way under step-<n>.

Both bring the tokenizer of the run, with the chat template that its rows were rendered with.
"""

import copy
import logging
from typing import Any

from lora_dpo_jax.huggingface.adapters import save_adapter
from lora_dpo_jax.huggingface.tensors import TensorFiles
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.runs.outputs import check_free_space, exports_of, step_target
from lora_dpo_jax.runs.setup import Base, TrainConfig
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")


class Exports:
    """A hook. It comes after the one that saves the state: an export that fails loses nothing."""

    def __init__(
        self, config: TrainConfig, lora: LoraConfig, base: Base, num_steps: int, first_step: int = 0, *, run: str
    ):
        """`run`: the id by which an export knows a former one of the same run."""
        self.config, self.lora, self.base, self.num_steps = config, lora, base, num_steps
        self.owner: Any = {"run": run, "overwrite": config.overwrite}
        if config.hf_save_steps is not None and not exports_of(config):
            raise ValueError("hf_save_steps is set, but neither peft_save_path nor merged_hf_save_path is")
        if config.merged_hf_save_path is not None:
            tensors = TensorFiles(base.folder)
            needed = sum(tensors.info(name).num_bytes for name in tensors.names)
            left = range(max(first_step, 1), num_steps)
            on_the_way = sum(step % config.hf_save_steps == 0 for step in left) if config.hf_save_steps else 0
            check_free_space("merged_hf_save_path", config.merged_hf_save_path, needed, on_the_way + 1)

    def __call__(self, info: StepInfo[TrainState]) -> None:
        write = {"peft_save_path": self._save_adapter, "merged_hf_save_path": self._save_merged}
        for setting, path in exports_of(self.config):
            target = path if info.step == self.num_steps else step_target(path, info.step)
            try:
                write[setting](info, target)
            except Exception as error:
                raise OSError(
                    f"{setting}: {target} could not be written after {info.step} steps: {error}. A checkpoint of this "
                    "step is saved: make room there, or set another path, and start the same command again (with "
                    "trainer.id set to the name of the run's folder); it goes on with this export"
                ) from error

    def _save_adapter(self, info: StepInfo[TrainState], target: str) -> None:
        save_adapter(
            info.state.model,
            target,
            base_model=self.config.initialize_from_hf,
            revision=self.config.hf_revision,
            config=self.lora,
            tokenizer=self.base.tokenizer,
            **self.owner,
        )

    def _save_merged(self, info: StepInfo[TrainState], target: str) -> None:
        # Where nothing else was trained with, the base's own files stay as they are.
        is_bases_own = not self.config.data.tokenizer and not any(_templates(self.config).values())
        tokenizer = None if is_bases_own else self.base.tokenizer
        save_merged(info.state.model, self.base.folder, target, tokenizer=tokenizer, **self.owner)


def with_trained_template(config: TrainConfig, tokenizer: Any) -> Any:
    """The tokenizer with the chat template of the run's rows: its own, unless a component sets format.chat_template.

    Where components differ, the first of them that sets one decides, and the log names the others.
    """
    templates = _templates(config)
    chosen = next((name for name, template in templates.items() if template is not None), None)
    if chosen is None:
        return tokenizer
    own, exported = tokenizer.chat_template, templates[chosen]
    if others := [name for name, template in templates.items() if (own if template is None else template) != exported]:
        logger.warning(
            "The exports and sample_prompts have the chat template of data.components.%s; %s %s trained with another. "
            "To have another, put its component first, or give all components the same format.chat_template",
            chosen,
            ", ".join(others),
            "is" if len(others) == 1 else "are",
        )
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = exported
    return tokenizer


def _templates(config: TrainConfig) -> dict[str, str | None]:
    """By the name of each component that is trained on, its format.chat_template."""
    weights = config.data.train_weights or {}
    return {
        name: component.format.template_text()
        for name, component in config.data.components.items()
        if component.source.has_split("train") and weights.get(name, 1) > 0
    }
