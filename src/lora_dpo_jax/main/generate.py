"""Completions of a base model, an adapter or a merged model, or of several adapters of one base.

python -m lora_dpo_jax.main.generate --model <folder or hub id> [--adapter <PEFT folder>] --prompt Hello [--prompt ...]
python -m lora_dpo_jax.main.generate --model BASE --adapters '{before: null, helpful: A, safe: B}' --prompt Hello
"""

import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from fsspec.core import url_to_fs
from transformers import PreTrainedTokenizerBase

from lora_dpo_jax.data.config import read_template
from lora_dpo_jax.data.messages import read_messages
from lora_dpo_jax.data.readers import decompress, suffixes
from lora_dpo_jax.data.sources import RowError, RowFile
from lora_dpo_jax.generation import GenerationConfig, complete, encode_prompt, encode_prompts, read_stop_ids
from lora_dpo_jax.huggingface.adapter_config import adapter_folder, read_adapter_config, read_base_model
from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.huggingface.vocabulary import Enlargement, read_enlargement
from lora_dpo_jax.huggingface.weights import NOT_ENLARGED, load_model, read_config
from lora_dpo_jax.lora import for_inference
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths, spelled_alike
from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.exchange import is_first_process
from lora_dpo_jax.processes.start import DistributedConfig
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.settings.arguments import parse as parse_settings
from lora_dpo_jax.settings.choices import check_choice, check_choices

logger = logging.getLogger(__name__)

Prompt = str | list[dict[str, Any]]
# Arguments that a template may get besides its own variables.
OPTIONS = {"tools", "documents", "add_generation_prompt", "continue_final_message"}
TAKEN = {
    name
    for function in (complete, encode_prompt, PreTrainedTokenizerBase.apply_chat_template)
    for name in inspect.signature(function).parameters
    if name not in OPTIONS
} | {"messages"}
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


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
    dtype: Literal["f32", "bf16"] | None = None  # of the weights; null: f32 on CPU, bf16 on accelerators
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
    origins, prompts = _read_prompts(config)
    base, adapters = _model_folders(config)
    tokenizers = {setting: _load_tokenizer(config, base, adapter) for setting, adapter in adapters.items()}
    # Before the weights are read, so that a prompt that the template rejects is an early error.
    for tokenizer in tokenizers.values():
        encode_prompts(tokenizer, prompts, chat=config.chat, origins=origins, **template_kwargs)
    stop_ids, by_adapter = read_stop_ids(base), []
    for setting, model in _models(config, base, adapters):
        options: Any = {"stop_ids": stop_ids, "chat": config.chat, "origins": origins, **template_kwargs}
        by_adapter.append(complete(model, tokenizers[setting], prompts, config.generation, **options))
    completions = [completion for of_prompt in zip(*by_adapter, strict=True) for completion in of_prompt]
    if is_first_process():  # each process has computed the same, on its own device
        _report(config, prompts, completions)
    return completions


def _models(config: GenerateConfig, base: Path, adapters: dict[str, Path | None]) -> Iterator[tuple[str, CausalLM]]:
    """The base with each adapter. The weights are read once, and one adapter is in memory at a time."""
    dtype = config.dtype or ("f32" if jax.default_backend() == "cpu" else "bf16")
    decoder = _decoder(adapters, base)
    enlargement = _enlargement(adapters, base, decoder)
    settings: Any = {"dtype": DTYPES[dtype], "quantization": config.quantization, "enlargement": enlargement}
    plain = load_model(base, enlargement.config(decoder), **settings)
    base_model = config.model if config.adapter or config.adapters else None
    for setting, adapter in adapters.items():
        adapted = plain if adapter is None else load_adapter(plain, adapter, base_model=base_model)
        yield setting, for_inference(adapted)


def _decoder(adapters: dict[str, Path | None], base: Path) -> DecoderConfig:
    """The base as its adapters need it. Raises ValueError if they need its experts' weights held in two ways."""
    found = {
        setting: read_config(base, None if adapter is None else read_adapter_config(adapter))
        for setting, adapter in adapters.items()
    }
    first, *others = found
    for setting in others:
        if found[setting] != found[first]:
            raise ValueError(
                f"{first} and {setting} cannot share one base: one adapts parameters of all experts "
                "(target_parameters), the other does not; set each alone, as adapter"
            )
    return found[first]


def _enlargement(adapters: dict[str, Path | None], base: Path, decoder: DecoderConfig) -> Enlargement:
    """The vocabulary that an adapter brings along. Raises ValueError if others would have to share it."""
    for setting, adapter in adapters.items():
        if adapter is not None and (found := read_enlargement(adapter, base, decoder)):
            if len(adapters) > 1:
                raise ValueError(
                    f"{setting} brings the rows of an enlarged vocabulary, which the others do not have: set it "
                    "alone, as adapter"
                )
            return found
    return NOT_ENLARGED


def _report(config: GenerateConfig, prompts: Sequence[Prompt], completions: list[str]) -> None:
    """Prints and writes the completions, all those of a prompt together."""
    names = [*config.adapters] or [None]
    lines: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        print(f"=== prompt {number + 1}\n{printable(_readable(prompt))}")
        for name, completion in zip(names, completions[number * len(names) :], strict=False):
            title = "completion" if name is None else f"completion of {name}"
            print(printable(f"--- {title}\n{completion}"))
            of_adapter = {} if name is None else {"adapter": name}
            lines.append({"prompt": prompt, **of_adapter, "completion": completion})
        print(flush=True)
    if config.output is not None:
        write_output(config.output, lines)


def _read_prompts(config: GenerateConfig) -> tuple[list[str], list[Prompt]]:
    """(the origin of each prompt, the prompts with the system message if there is one)."""
    found: list[tuple[str, Prompt]] = [(f"prompts[{index}]", prompt) for index, prompt in enumerate(config.prompts)]
    if config.prompts_file is not None:
        found += _file_prompts(config.prompts_file)
        if not found:
            raise ValueError(f"prompts_file={config.prompts_file!r} holds no prompts")
    origins = [origin for origin, _ in found]
    return origins, [_with_system(prompt, config.system, origin) for origin, prompt in found]


def _file_prompts(url: str) -> Iterator[tuple[str, Prompt]]:
    filesystem, path = url_to_fs(url)
    if not filesystem.isfile(path):
        raise FileNotFoundError(f"prompts_file={url!r} is not a file{spelled_alike(url)}")
    suffix, compression = suffixes(path)
    if suffix == "txt":
        with filesystem.open(path, "rb") as raw:
            lines = decompress(raw, compression).read().decode("utf-8").splitlines()
        yield from (
            (f"prompts_file={url!r}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()
        )
    elif suffix == "jsonl":
        for number, row in RowFile(url, filesystem, path).rows():
            origin = f"prompts_file={url!r}, row {number}"
            yield origin, _row_prompt(row, origin)
    else:
        raise ValueError(f"prompts_file={url!r}: the suffix must be .txt or .jsonl (then .gz, .zst, ... if compressed)")


def _row_prompt(row: Any, origin: str) -> Prompt:
    if isinstance(row, RowError):
        raise row
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        return read_messages(prompt, "prompt", origin)  # as in rows to train on
    found = sorted(row) if isinstance(row, dict) and prompt is None else repr(prompt or row)[:80]
    raise ValueError(f"{origin}: needs `prompt`, a string or a list of messages (`role`, `content`); found {found}")


def _with_system(prompt: Prompt, system: str | None, origin: str) -> Prompt:
    if system is None:
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if messages[0]["role"] == "system":
        raise ValueError(f"system is set, but {origin} has a system message already: {messages[0]}")
    return [{"role": "system", "content": system}, *messages]


def _model_folders(config: GenerateConfig) -> tuple[Path, dict[str, Path | None]]:
    """The folder of the base (or merged) model, and those of the adapters on top of it, by their settings."""
    model = _folder("model", config.model)
    if not _is_adapter(model) or any(model.glob("model*.safetensors")):
        return model, {setting: _adapter_folder(setting, path) for setting, path in config.named_adapters.items()}
    for setting, path in config.named_adapters.items():
        if path is not None or config.adapters:
            raise ValueError(
                f"model={config.model!r} is an adapter itself, and {setting}={path!r} would be a second one: set model "
                "to their base"
            )
    base, revision = read_base_model(model)
    found = f"model={config.model!r} is an adapter, and its base_model_name_or_path={base!r}"
    advice = "Set model to the base model's folder or hub id, and adapter to this folder"
    if not base:
        raise ValueError(f"{found} names no base model. {advice}")
    try:
        return local_folder(base, revision=revision), {"adapter": model}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{found} cannot be found: {error}. {advice}") from error


def _adapter_folder(setting: str, path: str | None) -> Path | None:
    adapter = None if path is None else _folder(setting, path)
    if adapter is not None and not _is_adapter(adapter):
        raise ValueError(f"{setting}={path!r} is no PEFT adapter: {adapter} has no adapter_config.json")
    return adapter


def _folder(setting: str, name_or_path: str) -> Path:
    try:
        return adapter_folder(local_folder(name_or_path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{setting}: {error}") from error


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _load_tokenizer(config: GenerateConfig, base: Path, adapter: Path | None) -> Any:
    folder = base
    if config.tokenizer is not None:
        folder = _folder("tokenizer", config.tokenizer)
    elif adapter is not None and (adapter / "tokenizer_config.json").exists():
        folder = adapter
    try:
        tokenizer = read_tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"{error}. Fix it, or set tokenizer") from error
    has_template = tokenizer.chat_template or config.chat_template
    if config.system is not None and not has_template:
        raise ValueError(f"system needs a chat template, and the tokenizer of {folder} has none: set chat_template")
    if config.chat and not has_template:
        logger.warning("The tokenizer of %s has no chat template: prompts that are strings are raw text", folder)
    return tokenizer


def _readable(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{message['role']}] {message.get('content', '')}" for message in prompt)


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
