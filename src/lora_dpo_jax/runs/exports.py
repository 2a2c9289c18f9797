"""The exports of a run, the adapter and the merged model: the final ones, and intermediate ones under step-<n>.

Both include the tokenizer of the run, with the chat template of its rows.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_dpo_jax.data.config import PreferenceDataConfig
from lora_dpo_jax.huggingface.adapter_config import base_from_anywhere
from lora_dpo_jax.huggingface.adapters import save_adapter
from lora_dpo_jax.huggingface.card import NO_NOTES, Training, merged_card, model_card
from lora_dpo_jax.huggingface.gguf_adapter import check_gguf_layers, save_gguf
from lora_dpo_jax.huggingface.mxfp4 import unpacked
from lora_dpo_jax.huggingface.tensors import TensorFiles
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.runs.base import Base
from lora_dpo_jax.runs.outputs import check_free_space, step_target
from lora_dpo_jax.training.loop import StepInfo
from lora_dpo_jax.training.step import TrainState

logger = logging.getLogger("lora_dpo_jax")


class Exports:
    """A hook that writes the exports. It runs after the hook that saves the state, so a failed export loses nothing."""

    def __init__(
        self,
        paths: Sequence[tuple[str, str]],
        base: Base,
        lora: LoraConfig,
        *,
        run: str,
        overwrite: bool,
        num_steps: int,
        has_own_tokenizer: bool,
        peft_scaling: str = "as_is",
        training: Training,
        evaluations: Callable[[], Sequence[tuple[int, Mapping[str, float]]]],
        repos: Mapping[str, str],
        notes: Mapping[str, str] = NO_NOTES,
    ):
        """`paths`: (setting, path) of each export. `run`: the id of the run, which may replace its own exports.

        `has_own_tokenizer`: the tokenizer of the run differs from the base's, so a merged model includes it.
        The others are for the cards: `evaluations` returns (step, held-out scores) so far; `repos` are the ids on the
        hub, as in HubConfig; `notes` as in `model_card`.
        """
        self.paths, self.base, self.lora, self.num_steps = paths, base, lora, num_steps
        self.has_own_tokenizer, self.peft_scaling = has_own_tokenizer, peft_scaling
        self.training, self.evaluations, self.repos, self.notes = training, evaluations, repos, notes
        self.owner: Any = {"run": run, "overwrite": overwrite}

    def check_room(self, first_step: int, every: int | None) -> None:
        """Raises OSError if a merged model has no room; warns if intermediate ones (each `every` steps) have none."""
        for setting, path in self.paths:
            if setting == "merged_hf_save_path":
                tensors = unpacked(TensorFiles(self.base.folder))
                needed = sum(tensors.info(name).num_bytes for name in tensors.names)
                left = range(max(first_step, 1), self.num_steps)
                intermediate = sum(step % every == 0 for step in left) if every else 0
                check_free_space(setting, path, needed, intermediate + 1)

    def check_layers(self, model: CausalLM) -> None:
        """Raises ValueError if an export has no form for a layer with an adapter."""
        if any(setting == "gguf_save_path" for setting, _ in self.paths):
            check_gguf_layers(model, self.base.folder)

    def __call__(self, info: StepInfo[TrainState]) -> None:
        write = {
            "peft_save_path": self._save_adapter,
            "merged_hf_save_path": self._save_merged,
            "gguf_save_path": self._save_gguf,
        }
        for setting, path in self.paths:
            target = path if info.step == self.num_steps else step_target(path, info.step)
            try:
                write[setting](info.state.model, target)
            except Exception as error:
                raise OSError(
                    f"{setting}: {target} could not be written after {info.step} steps: {error}. A checkpoint of this "
                    "step is saved: make room there, or set another path, and start the same command again (with "
                    "trainer.id set to the name of the run's folder); it resumes with this export"
                ) from error

    def _save_adapter(self, model: CausalLM, target: str) -> None:
        save_adapter(
            model,
            target,
            base_model=self.base.name,
            revision=self.base.revision,
            config=self.lora,
            tokenizer=self.base.tokenizer,
            peft_scaling=self.peft_scaling,
            enlargement=self.base.enlargement,
            card=functools.partial(model_card, **self._card("adapter")),
            **self.owner,
        )

    def _save_merged(self, model: CausalLM, target: str) -> None:
        # Without a tokenizer of the run's own, the base's files stay as they are.
        tokenizer = self.base.tokenizer if self.has_own_tokenizer else None
        card = merged_card(
            base_from_anywhere(self.base.name), self.lora, revision=self.base.revision, **self._card("merged")
        )
        save_merged(
            model,
            self.base.folder,
            target,
            tokenizer=tokenizer,
            enlargement=self.base.enlargement,
            card=card,
            **self.owner,
        )

    def _save_gguf(self, model: CausalLM, target: str) -> None:
        save_gguf(model, target, source=self.base.folder, **self.owner)

    def _card(self, export: str) -> dict[str, Any]:
        """What the card of an export tells besides its base and its adapters."""
        found = self.evaluations()
        ends = {f"after step {step}": scores for step, scores in (*found[:1], *found[-1:])}
        training = dataclasses.replace(self.training, scores=ends)
        return {"notes": self.notes, "training": training, "repo": self.repos.get(export)}


def has_own_tokenizer(data: PreferenceDataConfig) -> bool:
    """Whether the rows are tokenized or rendered by anything other than the base's own tokenizer."""
    return bool(data.tokenizer) or any(_templates(data).values())


def with_trained_template(data: PreferenceDataConfig, tokenizer: Any) -> Any:
    """The tokenizer with the chat template of the run's rows: its own, unless a component sets format.chat_template.

    If components differ, the first one that sets a template decides, and the log names the others.
    """
    templates = _templates(data)
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


def _templates(data: PreferenceDataConfig) -> dict[str, str | None]:
    """The format.chat_template of each component that is trained on, by the name of the component."""
    weights = data.train_weights or {}
    return {
        name: component.format.template_text()
        for name, component in data.components.items()
        if component.source.has_split("train") and weights.get(name, 1) > 0
    }
