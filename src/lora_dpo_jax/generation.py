"""Completions with a chat template and a key-value cache, greedy or sampled."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError

from lora_dpo_jax.decoding import Request, fulfil
from lora_dpo_jax.json_objects import is_whole, read_json_object
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.sampling import GenerationConfig

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


def complete(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    config: GenerationConfig,
    *,
    stop_ids: Collection[int] = (),
    chat: bool = True,
    origins: Sequence[str] | None = None,
    own_kwargs: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> list[str]:
    """The completion of each prompt, without special tokens.

    The tokenizer's chat template renders a list of messages, with `template_kwargs` and each prompt's `own_kwargs`. It
    also renders a string, as the only user message, if there is a template and `chat` is true. Any other string is raw
    text. A completion ends at one of `stop_ids` or at the tokenizer's end-of-sequence token. `origins` name the prompts
    in errors.
    """
    options: Any = {"chat": chat, "origins": origins, "own_kwargs": own_kwargs}
    token_ids = encode_prompts(tokenizer, prompts, **options, **template_kwargs)
    stop_ids = {*stop_ids} | ({tokenizer.eos_token_id} - {None})
    completions = generate(model, token_ids, config, stop_ids=stop_ids)
    return [tokenizer.decode(completion, skip_special_tokens=True) for completion in completions]


def encode_prompts(
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    *,
    chat: bool = True,
    origins: Sequence[str] | None = None,
    own_kwargs: Sequence[Mapping[str, Any]] | None = None,
    **template_kwargs: Any,
) -> list[list[int]]:
    """The tokens of each prompt; see `complete`. Raises ValueError that names the first prompt with an error."""
    token_ids = []
    for index, prompt in enumerate(prompts):
        kwargs = {**template_kwargs, **(own_kwargs[index] if own_kwargs else {})}
        try:
            token_ids.append(encode_prompt(tokenizer, prompt, chat=chat, **kwargs))
        except ValueError as error:
            raise ValueError(f"{origins[index] if origins else f'prompts[{index}]'}: {error}") from error
    return token_ids


def encode_prompt(
    tokenizer: Any, prompt: str | Sequence[Message], *, chat: bool = True, **template_kwargs: Any
) -> list[int]:
    """The tokens of one prompt; see `complete`. Raises ValueError if the prompt cannot be encoded."""
    _check_surrogates(prompt)
    has_template = bool(tokenizer.chat_template or template_kwargs.get("chat_template"))
    if isinstance(prompt, str):
        if not (chat and has_template):
            return _encode_text(tokenizer, prompt)
        prompt = [{"role": "user", "content": prompt}]
    if not has_template:
        raise ValueError("the prompt is a list of messages, but the tokenizer has no chat template: give a string")
    template_kwargs = {"add_generation_prompt": True, **template_kwargs}
    try:
        return tokenizer.apply_chat_template(list(prompt), tokenize=True, return_dict=False, **template_kwargs)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template is a program, and may raise any type for odd messages
        raise ValueError(f"the chat template rejects it: {error}") from error


def _check_surrogates(prompt: str | Sequence[Message]) -> None:
    try:
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    # Some tokenizers add the end-of-sequence token to every text. A prompt must not have it, because it continues.
    ended = tokenizer.eos_token and ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ended and len(ids) > 1 else ids


def read_stop_ids(folder: Path) -> frozenset[int]:
    """The token ids that end a completion: from `generation_config.json`, or from `config.json` if that is absent.

    Raises ValueError that names the file if `eos_token_id` is no token id, no list of these and not null.
    """
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            settings = read_json_object(folder / name)
            ids = settings.taken("eos_token_id", None, _is_ids, "a token id, a list of them or null")
            return frozenset([] if ids is None else ids if isinstance(ids, list) else [ids])
    return frozenset()


def _is_ids(value: Any) -> bool:
    return all(is_whole(item, 0) for item in (value if isinstance(value, list) else [value]))


def generate(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    stop_ids: Collection[int],
    streams: Sequence[int] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, up to the first of `stop_ids` but without it.

    `streams`: the number of each prompt's random stream, in [0, 2**32); None: its index. A completion depends on its
    prompt, its stream and the seed, not on the other prompts or on `batch_size`.
    """
    _check_prompts(model, prompts, config)
    numbers = range(len(prompts)) if streams is None else streams
    requests = [Request(stream, prompt) for stream, prompt in zip(numbers, prompts, strict=True)]
    # Beyond a length, `longrope` rotates all keys otherwise, so those in the cache are computed again, as transformers
    # does.
    for length in dict.fromkeys((model.config.switch_length, None)):
        for request in requests:
            request.extend_to(length, config.max_new_tokens)
        if open_requests := [request for request in requests if request.budget]:
            fulfil(model, open_requests, config, frozenset(stop_ids))
    return [request.completion for request in requests]


def _check_prompts(model: CausalLM, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    limit, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] has no tokens; a completion needs at least one token before it")
        if bad := [token for token in prompt if not 0 <= token < vocab_size]:
            raise ValueError(f"prompts[{i}] holds token {bad[0]}, but the model knows 0 to {vocab_size - 1}")
    longest = max(map(len, prompts), default=0)
    if longest + config.max_new_tokens > limit:
        logger.warning(
            "The longest prompt has %d tokens; with max_new_tokens=%d, its completion can exceed the model's "
            "max_position_embeddings=%d. Text beyond this length is often poor.",
            longest,
            config.max_new_tokens,
            limit,
        )
