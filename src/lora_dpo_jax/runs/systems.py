"""What answers prompts: a base, an adapter on it, a merged model, or a file of completions made elsewhere."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lora_dpo_jax.data.tokenizing import tokenizer_digest
from lora_dpo_jax.generation import GenerationConfig, encode_prompt, generate, read_stop_ids
from lora_dpo_jax.huggingface.adapter_config import adapter_folder, read_adapter_config, read_base_model
from lora_dpo_jax.huggingface.adapters import load_adapter
from lora_dpo_jax.huggingface.digests import tensor_digests
from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.huggingface.vocabulary import Enlargement, read_enlargement
from lora_dpo_jax.huggingface.weights import NOT_ENLARGED, load_model, read_config
from lora_dpo_jax.lora import for_inference
from lora_dpo_jax.models import CausalLM, DecoderConfig
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.runs.prompts import Prompt
from lora_dpo_jax.settings.choices import check_choice

logger = logging.getLogger(__name__)

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
Dtype = Literal["f32", "bf16"]


@dataclass(frozen=True)
class SystemConfig:
    """What answers the prompts: a model, a model with an adapter, or a file of completions."""

    model: str | None = None  # folder or hub id of a base or merged model, or of an adapter that names its base
    revision: str | None = None  # branch, tag or commit of that hub id
    adapter: str | None = None  # a PEFT folder (or hub id) on top of `model`
    tokenizer: str | None = None  # null: the adapter's if it has one, else the model's
    dtype: Dtype | None = None  # of the weights; null: f32 on CPU, bf16 on accelerators
    quantization: str | None = None  # of the weights: nf4, int8 or none; null: as the run's, or none
    completions_file: str | None = None  # .jsonl: `prompt` and `completion`, as generate writes; instead of a model

    def __post_init__(self):
        names = ("model", "adapter", "tokenizer", "completions_file")
        refuse_impossible_paths({name: getattr(self, name) for name in names})
        if self.quantization is not None:
            check_choice("quantization", self.quantization, QUANTIZATIONS)
        of_model = ("model", "revision", "adapter", "tokenizer", "dtype", "quantization")
        given = [name for name in of_model if getattr(self, name) is not None]
        if self.completions_file is not None and given:
            raise ValueError(
                f"completions_file and {given[0]} exclude each other: a file of completions needs no model"
            )


@dataclass(frozen=True)
class ModelSystems:
    """One base and adapters on it, each of which completes prompts. The weights are read once.

    Reading the settings raises ValueError or FileNotFoundError with the name of the wrong one, before the weights are
    read.
    """

    base: Path  # a folder
    adapters: Mapping[str, Path | None]  # by setting; None: the base alone
    tokenizers: Mapping[str, Any]  # by setting
    base_name: str | None  # as the setting of the model names it, if adapters are given beside it
    dtype: Dtype | None = None
    quantization: str = "none"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of all prompts
    load: Callable | None = None  # reads the weights; None: load_model

    @classmethod
    def find(
        cls,
        model: tuple[str, str],
        adapters: Mapping[str, str | None],
        *,
        may_be_adapter: bool = True,
        revision: str | None = None,
        tokenizer: tuple[str, str | None] = ("tokenizer", None),
        **options: Any,
    ) -> "ModelSystems":
        """`model` and `tokenizer`: (setting, folder or hub id). `adapters`: the same for each adapter, None for none.

        `may_be_adapter`: `model` may be an adapter that names its base. A tokenizer of None is the adapter's if that
        has one, else the model's. `revision` is that of `model` on the hub. `options`: dtype, quantization,
        template_kwargs, and what loads the weights.
        """
        base, folders = _model_folders(*model, revision, adapters, may_be_adapter)
        tokenizers = {setting: _load_tokenizer(*tokenizer, base, folder) for setting, folder in folders.items()}
        is_base = not may_be_adapter or any(path is not None for path in adapters.values())
        return cls(base, folders, tokenizers, model[1] if is_base else None, **options)

    @property
    def without_template(self) -> list[str]:
        """The folders of the tokenizers that have no chat template, if none is given for all prompts."""
        if self.template_kwargs.get("chat_template"):
            return []
        return [tokenizer.name_or_path for tokenizer in self.tokenizers.values() if not tokenizer.chat_template]

    def encode(self, prompts: Sequence[Prompt]) -> dict[str, list[list[int]]]:
        """The tokens of each prompt, by the setting of the adapter. Raises ValueError with the prompt's origin."""
        return {setting: self._encoded(tokenizer, prompts) for setting, tokenizer in self.tokenizers.items()}

    def completions(self, prompts: Sequence[Prompt], config: GenerationConfig) -> Iterator[tuple[str, list[str]]]:
        """(setting of the adapter, the completion of each prompt without special tokens) of one adapter after another.

        Raises ValueError with the prompt's origin for one that cannot be encoded, before the weights are read.
        """
        ids = self.encode(prompts)
        for setting, model in self.models():
            decode = self.tokenizers[setting].decode
            new_ids = generate(model, ids[setting], config, stop_ids=self.stop_ids(setting))
            yield setting, [decode(of_prompt, skip_special_tokens=True) for of_prompt in new_ids]

    def joined(self, other: "ModelSystems") -> "ModelSystems | None":
        """Both on one base; None if they cannot share it."""
        same = all(
            getattr(self, name) == getattr(other, name) for name in ("base", "dtype", "quantization", "template_kwargs")
        )
        if not same:
            return None
        names = {self.base_name, other.base_name} - {None}
        if len(names) > 1 or self._decoder() != other._decoder():
            return None
        if any(systems._enlargement(systems._decoder()) for systems in (self, other)):
            return None
        return dataclasses.replace(
            self,
            adapters={**self.adapters, **other.adapters},
            tokenizers={**self.tokenizers, **other.tokenizers},
            base_name=next(iter(names), None),
        )

    def identities(self, memory: Path) -> dict[str, dict[str, Any]]:
        """All that decides completions but prompts and generation, by the setting of the adapter.

        Digests of files are remembered in `memory`.
        """
        shared = {
            "base": {**_config_of(self.base, "config.json"), "files": tensor_digests(self.base, memory=memory)},
            "dtype": self.weights_dtype,
            "quantization": self.quantization,
            "template_kwargs": dict(self.template_kwargs),
        }
        found = {}
        for setting, folder in self.adapters.items():
            adapter = None
            if folder is not None:
                files = tensor_digests(folder, "adapter_model", memory=memory)
                adapter = {**_config_of(folder, "adapter_config.json"), "files": files}
            tokenizer = tokenizer_digest(self.tokenizers[setting])
            found[setting] = {**shared, "adapter": adapter, "tokenizer": tokenizer}
        return found

    @property
    def weights_dtype(self) -> Dtype:
        return self.dtype or ("f32" if jax.default_backend() == "cpu" else "bf16")

    def models(self) -> Iterator[tuple[str, CausalLM]]:
        """The base with each adapter. One adapter is in memory at a time."""
        base = self._load_base()
        for setting in self.adapters:
            yield setting, self._with_adapter(base, setting)

    def model(self, setting: str) -> CausalLM:
        """The base with the adapter of this setting. The base stays in memory for the next call."""
        return self._with_adapter(self._base, setting)

    @functools.cached_property
    def _base(self) -> CausalLM:
        return self._load_base()

    def _load_base(self) -> CausalLM:
        decoder = self._decoder()
        enlargement = self._enlargement(decoder)
        settings: Any = {"dtype": DTYPES[self.weights_dtype], "quantization": self.quantization}
        load = self.load or load_model
        return load(self.base, enlargement.config(decoder), enlargement=enlargement, **settings)

    def _with_adapter(self, base: CausalLM, setting: str) -> CausalLM:
        adapter = self.adapters[setting]
        adapted = base if adapter is None else load_adapter(base, adapter, base_model=self.base_name)
        return for_inference(adapted)

    def stop_ids(self, setting: str) -> frozenset[int]:
        """The tokens that end a completion of the base with the adapter of this setting."""
        return read_stop_ids(self.base) | ({self.tokenizers[setting].eos_token_id} - {None})

    def _encoded(self, tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
        ids = []
        for prompt in prompts:
            kwargs = {**self.template_kwargs, **prompt.template_kwargs}
            try:
                ids.append(encode_prompt(tokenizer, prompt.content, chat=prompt.chat, **kwargs))
            except ValueError as error:
                raise ValueError(f"{prompt.origin}: {error}") from error
        return ids

    def _decoder(self) -> DecoderConfig:
        """The base as its adapters need it. Raises ValueError if they need its experts' weights held in two ways."""
        found = {
            setting: read_config(self.base, None if adapter is None else read_adapter_config(adapter))
            for setting, adapter in self.adapters.items()
        }
        first, *others = found
        for setting in others:
            if found[setting] != found[first]:
                raise ValueError(
                    f"{first} and {setting} cannot share one base: one adapts parameters of all experts "
                    "(target_parameters), the other does not; set each alone, as adapter"
                )
        return found[first]

    def _enlargement(self, decoder: DecoderConfig) -> Enlargement:
        """The vocabulary that an adapter brings along. Raises ValueError if others would have to share it."""
        for setting, adapter in self.adapters.items():
            if adapter is not None and (found := read_enlargement(adapter, self.base, decoder)):
                if len(self.adapters) > 1:
                    raise ValueError(
                        f"{setting} brings the rows of an enlarged vocabulary, which the others do not have: set it "
                        "alone, as adapter"
                    )
                return found
        return NOT_ENLARGED


def _model_folders(
    setting: str, model: str, revision: str | None, adapters: Mapping[str, str | None], may_be_adapter: bool
) -> tuple[Path, dict[str, Path | None]]:
    """The folder of the base (or merged) model, and those of the adapters on top of it, by their settings."""
    folder = _folder(setting, model, revision)
    if not _is_adapter(folder) or any(folder.glob("model*.safetensors")):
        return folder, {name: _adapter_folder(name, path) for name, path in adapters.items()}
    for name, path in adapters.items():
        if path is not None or not may_be_adapter:
            raise ValueError(
                f"{setting}={model!r} is an adapter itself, and {name}={path!r} would be a second one: set {setting} "
                "to their base"
            )
    base, of_base = read_base_model(folder)
    found = f"{setting}={model!r} is an adapter, and its base_model_name_or_path={base!r}"
    advice = f"Set {setting} to the base model's folder or hub id, and adapter to this folder"
    if not base:
        raise ValueError(f"{found} names no base model. {advice}")
    try:
        return local_folder(base, revision=of_base), dict.fromkeys(adapters, folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{found} cannot be found: {error}. {advice}") from error


def _adapter_folder(setting: str, path: str | None) -> Path | None:
    adapter = None if path is None else _folder(setting, path)
    if adapter is not None and not _is_adapter(adapter):
        raise ValueError(f"{setting}={path!r} is no PEFT adapter: {adapter} has no adapter_config.json")
    return adapter


def _folder(setting: str, name_or_path: str, revision: str | None = None) -> Path:
    try:
        return adapter_folder(local_folder(name_or_path, revision=revision))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{setting}: {error}") from error


def _config_of(folder: Path, name: str) -> dict[str, Any]:
    return {name: json.loads((folder / name).read_text(encoding="utf-8"))}


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def _load_tokenizer(setting: str, name: str | None, base: Path, adapter: Path | None) -> Any:
    folder = base
    if name is not None:
        folder = _folder(setting, name)
    elif adapter is not None and (adapter / "tokenizer_config.json").exists():
        folder = adapter
    try:
        return read_tokenizer(folder)
    except ValueError as error:
        raise ValueError(f"{error}. Fix it, or set {setting}") from error
