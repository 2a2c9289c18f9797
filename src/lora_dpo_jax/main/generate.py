"""Completions of a base model, an adapter or a merged model, or of several adapters of one base.

python -m lora_dpo_jax.main.generate --model <folder or hub id> [--adapter <PEFT folder>] --prompt Hello [--prompt ...]
python -m lora_dpo_jax.main.generate --model BASE --adapters '{before: null, helpful: A, safe: B}' --prompt Hello
"""

import inspect
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.config import read_template
from lora_dpo_jax.generation import GenerationConfig, complete, encode_prompt
from lora_dpo_jax.huggingface.weights import load_model
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.start import DistributedConfig
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.runs.prompts import Prompt, file_prompts, listed_prompts
from lora_dpo_jax.runs.systems import Dtype, ModelSystems
from lora_dpo_jax.settings.arguments import parse as parse_settings
from lora_dpo_jax.settings.choices import check_choice, check_choices

logger = logging.getLogger(__name__)

# Arguments that a template may get besides its own variables.
OPTIONS = {"tools", "documents", "add_generation_prompt", "continue_final_message"}
TAKEN = {
    name
    for function in (complete, encode_prompt, PreTrainedTokenizerBase.apply_chat_template)
    for name in inspect.signature(function).parameters
    if name not in OPTIONS
} | {"messages"}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GenerationConfig):
    """The model, and the prompts that it completes. Inherits, so that --temperature and the like need no prefix."""

    model: str  # folder or hub id of a base or merged model, or of an adapter that names its base
    adapter: str | None = None  # a PEFT folder (or hub id) on top of `model`
    # Several of them by name, in place of `adapter`; null is `model` alone. The weights are read once.
    adapters: dict[str, str | None] = field(default_factory=dict)
    tokenizer: str | None = None  # null: the adapter's if it has one, else the model's
    # On the command line also --prompt TEXT, any number of times. Its text is taken literally; this list is YAML.
    prompts: list[str] = field(default_factory=list)
    prompts_file: str | None = None  # .txt: one a line; .jsonl: `prompt`, a string or a list of messages
    # The system message before each prompt. An empty text is not null: it replaces a template's default.
    system: str | None = field(default=None, metadata={"may_be_empty": True})
    chat: bool = True  # false: prompts that are strings do not go through the chat template
    chat_template: str | None = None  # instead of the tokenizer's own: a Jinja text, or the path of one
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # such as {enable_thinking: false}
    dtype: Dtype | None = None  # of the weights; null: f32 on CPU, bf16 on accelerators
    quantization: str = "none"  # nf4 or int8: as model.quantization of the run that made the adapter
    output: str | None = None  # a .jsonl to write `prompt` and `completion` to

    def __post_init__(self):
        super().__post_init__()
        names = ("model", "adapter", "tokenizer", "prompts_file", "output")
        refuse_impossible_paths({name: getattr(self, name) for name in names})
        refuse_impossible_paths(self.named_adapters)
        if self.adapter is not None and self.adapters:
            raise ValueError("adapter and adapters set the same: name the one adapter in adapters too")
        if not self.prompts and self.prompts_file is None:
            raise ValueError("nothing to complete: give prompts (or --prompt), prompts_file or both")
        check_choices(self)
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if taken := sorted(TAKEN & set(self.chat_template_kwargs)):
            raise ValueError(f"chat_template_kwargs may not set {taken}: they are no variables of a template")
        if self.system is not None and not self.chat:
            raise ValueError("system needs the chat template, which chat=false leaves out; drop one of the two")

    @property
    def named_adapters(self) -> dict[str, str | None]:
        """The path of each adapter by its setting; null is the model alone."""
        several: dict[str, str | None] = {f"adapters.{name}": path for name, path in self.adapters.items()}
        return several or {"adapter": self.adapter}

    @property
    def generation(self) -> GenerationConfig:
        return GenerationConfig(**{f.name: getattr(self, f.name) for f in fields(GenerationConfig)})


def main(config: GenerateConfig) -> list[str]:
    """Prints each prompt with its completion, writes them to `output` if it is set, and returns the completions.

    With several adapters, all completions of a prompt come together, in the order of `adapters`.
    """
    template_kwargs = config.chat_template_kwargs
    if config.chat_template is not None:
        template_kwargs = {**template_kwargs, "chat_template": read_template("chat_template", config.chat_template)}
    if config.output is not None and is_first_process():
        inputs = {name: [file] for name in ("prompts_file", "chat_template") if (file := getattr(config, name))}
        lines = [("prompt", "completion"), ("prompt", "adapter", "completion")]
        check_output(config.output, lines=lines, inputs=inputs)
    prompts = _read_prompts(config)
    systems = ModelSystems.find(
        ("model", config.model),
        config.named_adapters,
        may_be_adapter=not config.adapters,
        tokenizer=("tokenizer", config.tokenizer),
        dtype=config.dtype,
        quantization=config.quantization,
        template_kwargs=template_kwargs,
        load=load_model,
    )
    _check_templates(config, systems)
    # Before the weights are read, so that a prompt that the template rejects is an early error.
    systems.encode(prompts)
    options: Any = {
        "chat": config.chat,
        "origins": [prompt.origin for prompt in prompts],
        "own_kwargs": [prompt.template_kwargs for prompt in prompts],
        **template_kwargs,
    }
    contents, by_adapter = [prompt.content for prompt in prompts], []
    for setting, model in systems.models():
        options["stop_ids"] = systems.stop_ids(setting)
        by_adapter.append(complete(model, systems.tokenizers[setting], contents, config.generation, **options))
    completions = [completion for of_prompt in zip(*by_adapter, strict=True) for completion in of_prompt]
    if is_first_process():  # each process has computed the same, on its own device
        _report(config, prompts, completions)
    return completions


def _read_prompts(config: GenerateConfig) -> list[Prompt]:
    prompts = listed_prompts(config.prompts, chat=config.chat)
    if config.prompts_file is not None:
        prompts += file_prompts(config.prompts_file, chat=config.chat)
    return [prompt.with_system(config.system) for prompt in prompts]


def _check_templates(config: GenerateConfig, systems: ModelSystems) -> None:
    for folder in systems.without_template:
        if config.system is not None:
            raise ValueError(f"system needs a chat template, and the tokenizer of {folder} has none: set chat_template")
        if config.chat:
            logger.warning("The tokenizer of %s has no chat template: prompts that are strings are raw text", folder)


def _report(config: GenerateConfig, prompts: Sequence[Prompt], completions: list[str]) -> None:
    """Prints and writes the completions, all those of a prompt together."""
    names = [*config.adapters] or [None]
    lines: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        print(f"=== prompt {number + 1}\n{printable(prompt.readable)}")
        for name, completion in zip(names, completions[number * len(names) :], strict=False):
            title = "completion" if name is None else f"completion of {name}"
            print(printable(f"--- {title}\n{completion}"))
            of_adapter = {} if name is None else {"adapter": name}
            lines.append({"prompt": prompt.content, **of_adapter, "completion": completion})
        print(flush=True)
    if config.output is not None:
        write_output(config.output, lines)


def parse(args: Sequence[str]) -> GenerateConfig:
    """The configuration of a command line. The word after --prompt is taken literally, dashes included."""
    prompts, rest = [], []
    words = iter(args)
    for word in words:
        name, equals, text = word.partition("=")
        if name != "--prompt":
            rest.append(word)
            continue
        text = text if equals else next(words, None)
        if text is None:
            raise ValueError("--prompt needs a text, and nothing follows")
        prompts.append(text)
    if prompts and any(word.split("=")[0] == "--prompts" for word in rest):
        raise ValueError("--prompt and --prompts set the same: use only one of them")
    return parse_settings(GenerateConfig, rest, values={"prompts": prompts} if prompts else {})


def run() -> None:
    """The command `lora-dpo-generate`."""
    log_to_stderr(logging.WARNING)
    with command(lambda: parse(sys.argv[1:]), lambda config: DistributedConfig()) as config:
        main(config)


if __name__ == "__main__":
    run()
