"""From an Example to tokens: the chat template's text, and exactly where in it the prompt ends.

    text      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|>\\n
    tokens                                              prompt | response: all of it is scored

What is asked of the template is what TRL asks: the prompt alone with its generation prompt, and all conversations
whole. The prompt's tokens are those a model is given at inference, and the same for all responses. Almost always they
begin all conversations, and the rest of these is scored, token for token as in TRL. Where they do not:

- tokens merge over the boundary ("assistant\\n" before "\\nHello"): the response is tokenized by itself;
- the generation prompt holds text that whole conversations lack (`<think>`): the prompt ends where the two part;
- the template renders the prompt's own messages differently when a response follows: the row is refused.
"""

import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from jinja2 import TemplateSyntaxError
from jinja2.defaults import DEFAULT_NAMESPACE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lora_dpo_jax.data.config import SliceStrategy
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.messages import Message
from lora_dpo_jax.data.rows import Example
from lora_dpo_jax.data.sources import RowError, attempt

# exact: as TRL. merged: a response was tokenized by itself. template: the end of the generation prompt was left out.
Boundary = Literal["exact", "merged", "template"]


class _Texts(NamedTuple):
    """Each of `whole` is `prompt` and a response."""

    prompt: str
    whole: tuple[str, ...]
    boundary: Boundary


class ExampleTokenizer:
    """Tokenizes examples in batches with a Hugging Face tokenizer and its chat template, or `chat_template` instead."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._leading = _leading_special_tokens(tokenizer)
        self._reserved = _names_of_the_renderer(tokenizer)

    def tokenize(self, examples: Iterable[Example | RowError]) -> list[tuple[TokenizedExample, Boundary] | RowError]:
        """In the order of `examples`. One that cannot be tokenized comes as the RowError that says why."""
        examples = list(examples)
        texts = [example if isinstance(example, RowError) else attempt(self._texts, example) for example in examples]
        wholes = [text for item in texts if isinstance(item, _Texts) for text in (item.prompt, *item.whole)]
        ids = iter(self.encode(wholes))
        results = []
        for example, item in zip(examples, texts, strict=True):
            if isinstance(example, Example) and isinstance(item, _Texts):
                prompt, *whole = itertools.islice(ids, 1 + len(item.whole))
                item = attempt(self._split, example, item, prompt, whole)
            results.append(item)
        return results

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids without the special tokens that the tokenizer would add: the template has written its own."""
        if not texts:
            return []
        if _is_plain_fast_tokenizer(self.tokenizer):
            backend = backend_of(self.tokenizer)
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore

    def _texts(self, example: Example) -> _Texts:
        if isinstance(example.prompt, str):
            texts = self._string_texts(example.prompt, [str(response) for response in example.responses])
            _refuse_surrogates("".join(texts.whole), example.origin)
        else:
            texts = self._chat_texts(example)
        if len(texts.prompt) in map(len, texts.whole):
            raise RowError("empty", example.origin, "the chat template writes nothing for one of the responses")
        return texts

    def _string_texts(self, prompt: str, responses: list[str]) -> _Texts:
        end = self.tokenizer.eos_token
        if not (isinstance(end, str) and end):
            raise ValueError("The tokenizer has no eos_token, which must end responses that are plain strings")
        ended = (text if text.endswith(end) else text + end for text in responses)
        return _Texts(prompt, tuple(prompt + text for text in ended), "exact")

    def _chat_texts(self, example: Example) -> _Texts:
        prompt = self._render(example, example.prompt, add_generation_prompt=True)
        whole = tuple(self._render(example, [*example.prompt, *response]) for response in example.responses)
        if all(text.startswith(prompt) for text in whole):
            return _Texts(prompt, whole, "exact")
        start = self._end_without_generation_prompt(example, prompt)
        if start is not None and all(text.startswith(start) for text in whole):
            return _Texts(start, whole, "template")
        shared = len(commonprefix([prompt, *whole]))
        before = (
            f"before {name} with {_excerpt(text, shared)}" for name, text in zip(example.names, whole, strict=True)
        )
        raise RowError(
            "boundary",
            example.origin,
            "the chat template renders the prompt differently when a response follows, so it has no exact end: "
            f"alone it goes on with {_excerpt(prompt, shared)}, {', '.join(before)}. "
            "Change the messages, or set format.chat_template to a template that renders them alike",
        )

    def _end_without_generation_prompt(self, example: Example, prompt: str) -> str | None:
        """As much of the prompt's text as begins every conversation that continues it, whatever the answer.

        None if that is not all of the prompt's messages, or if it ends within a token.
        """
        probes = [
            self._render(example, [*example.prompt, {"role": first["role"], "content": content}, *others])
            for first, *others in cast(tuple[list[Message], ...], example.responses)
            for content in ("A", "B")
        ]
        start = commonprefix([prompt, *probes])
        if not start.startswith(self._render(example, example.prompt)):
            return None
        ids, *continued = self.encode([start, prompt, *probes])
        return start if all(other[: len(ids)] == ids for other in continued) else None

    def _render(self, example: Example, messages: Any, add_generation_prompt: bool = False) -> str:
        if self.tokenizer.chat_template is None and self.chat_template is None:
            raise ValueError(
                f"{example.origin}: the tokenizer has no chat template for messages. Set format.chat_template"
            )
        if reserved := sorted(self._reserved & set(example.chat_template_kwargs)):
            raise RowError("malformed", example.origin, f"its chat_template_kwargs may not set {reserved}")
        render: Any = self.tokenizer.apply_chat_template
        try:
            text = render(
                messages,
                tools=example.tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **example.chat_template_kwargs,
            )
        except TemplateSyntaxError as error:
            whose = "the tokenizer's chat template" if self.chat_template is None else "format.chat_template"
            raise ValueError(f"{whose} is not valid Jinja: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program: what it raises over odd messages has no one type
            raise RowError("malformed", example.origin, f"the chat template refuses it: {error}") from error
        _refuse_surrogates(text, example.origin)
        return text

    def _split(
        self, example: Example, texts: _Texts, prompt: list[int], whole: list[list[int]]
    ) -> tuple[TokenizedExample, Boundary]:
        boundary = texts.boundary
        if example.implicit_prompt:
            # No text says where the prompt ends, so it ends with the last whole token that all share.
            prompt = list(commonprefix([prompt, *whole]))
        responses = []
        for ids, text in zip(whole, texts.whole, strict=True):
            if ids[: len(prompt)] == prompt:
                responses.append(ids[len(prompt) :])
            else:
                responses.append(self._encode_alone(example, text[len(texts.prompt) :], prompt, ids))
                boundary = "merged" if boundary == "exact" else boundary
        if isinstance(example.prompt, str):
            prompt = self._leading + prompt
        tokens = TokenizedExample(
            self._without_second_bos(_array(prompt)),
            tuple(self._without_second_eos(_array(ids)) for ids in responses),
            example.comparisons,
            columns=example.columns,
        )
        if not len(tokens.prompt):
            raise RowError(
                "empty", example.origin, "the prompt has no token to predict the first token of the responses from"
            )
        if not all(map(len, tokens.responses)):
            raise RowError("empty", example.origin, "one of the responses has no tokens")
        return tokens, boundary

    def _encode_alone(self, example: Example, response: str, prompt: list[int], whole: list[int]) -> list[int]:
        """Tokens of a response that follow those of the prompt and together spell the same text as `whole`."""
        expected = self._decode(whole)
        # Some tokenizers put a space before whatever begins a text; after an anchor, nothing begins.
        for anchor in ("", str(self.tokenizer.eos_token or ""), "\n", "a"):
            before, both = self.encode([anchor, anchor + response])
            if both[: len(before)] == before and self._decode(prompt + both[len(before) :]) == expected:
                return both[len(before) :]
        raise RowError(
            "boundary",
            example.origin,
            f"tokens merge over the end of the prompt ({_excerpt(self._decode(prompt[-4:]), 0)} before "
            f"{_excerpt(response, 0)}), and the tokenizer cannot write the response by itself",
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # type: ignore

    def _without_second_bos(self, ids: np.ndarray) -> np.ndarray:
        return ids[max(_run_of(self.tokenizer.bos_token_id, ids) - 1, 0) :]

    def _without_second_eos(self, ids: np.ndarray) -> np.ndarray:
        return ids[: len(ids) - max(_run_of(self.tokenizer.eos_token_id, ids[::-1]) - 1, 0)]


def fit_to_length(
    example: TokenizedExample,
    train_seq_len: int,
    strategy: SliceStrategy,
    origin: str,
    bos_token_id: int | None = None,
    names: Sequence[str] = ("chosen", "rejected"),
) -> TokenizedExample:
    """The example within train_seq_len, cut as format.slice_strategy says. Raises RowError where that is to refuse it.

    left: the beginning of the prompt goes, but for its BOS. right: the ends of the responses go, as with TRL's
    keep_start. Either way all responses keep the same prompt, and each part keeps at least one token. `names` are what
    messages call the responses.
    """
    if example.length <= train_seq_len:
        return example
    if strategy == "right" and len(example.prompt) < train_seq_len:
        room = train_seq_len - len(example.prompt)
        return replace(example, responses=tuple(response[:room] for response in example.responses))
    room = train_seq_len - max(map(len, example.responses))
    if strategy == "left" and room > 0:
        keeps_bos = room > 1 and example.prompt[0] == bos_token_id
        tail = example.prompt[len(example.prompt) - room + keeps_bos :]
        return replace(example, prompt=np.concatenate([example.prompt[:1], tail]) if keeps_bos else tail)
    longest = names[max(range(len(names)), key=lambda number: len(example.responses[number]))]
    raise RowError(
        "too_long",
        origin,
        f"prompt + {longest} is {example.length:,} tokens, more than train_seq_len={train_seq_len}. "
        "Raise train_seq_len, or set format.slice_strategy to drop, left or right.",
    )


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer, without the truncation and padding that the last call may have left in it."""
    backend: Any = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a plain text (a BOS, or nothing); what it puts after one is not wanted."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)  # type: ignore
    return full[:start]  # type: ignore


def _names_of_the_renderer(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """What a row may not give to the template: what decides how it is rendered, and what the renderer gives itself."""
    functions = (type(tokenizer).apply_chat_template, render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    given = {"messages", "raise_exception", "strftime_now", *DEFAULT_NAMESPACE, *tokenizer.special_tokens_map}
    return (names | given) - {"documents"}  # these are data: what a template for retrieval reads


def _is_plain_fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its Rust backend may be called directly (twice as fast): no Python code of its own changes texts."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerFast.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and not tokenizer.split_special_tokens
    )


def _run_of(token: Any, ids: np.ndarray) -> int:
    """How many times `ids` begins with this token."""
    others = np.flatnonzero(ids != token)
    return int(others[0]) if len(others) else len(ids)


def _refuse_surrogates(text: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed", origin, "holds half of a surrogate pair, which is no character") from error


def _excerpt(text: str, start: int) -> str:
    return repr(text[start : start + 40])


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
