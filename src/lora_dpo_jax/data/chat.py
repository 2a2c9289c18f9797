"""From an Example to tokens: the text of the chat template, and the exact end of the prompt in it.

    text      <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n | Hello!<|im_end|>\\n
    tokens                                              prompt | response: all of it is scored

As in TRL, the template renders the prompt alone with its generation prompt, and each whole conversation. The prompt's
tokens are those that a model gets at inference, and are the same for all responses. Almost always each conversation
begins with them, and its other tokens are its response, token for token as in TRL. The exceptions:

- tokens merge over the boundary ("assistant\\n" before "\\nHello"): the response is tokenized by itself;
- the generation prompt holds text that whole conversations lack (`<think>`): the prompt ends where the texts differ;
- the template renders the prompt's own messages differently when a response follows: the row is rejected.

All tokens of a response are scored, unless its format or its messages leave some out: see `scored`.
"""

import functools
import inspect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from os.path import commonprefix
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import tokenizers
from jinja2 import TemplateSyntaxError
from jinja2.defaults import DEFAULT_NAMESPACE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from lora_dpo_jax.data.config import FormatConfig, SliceStrategy
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.messages import Message, without_weight
from lora_dpo_jax.data.rows import Example
from lora_dpo_jax.data.scored import UnclearTurnError, nothing_scored, scored_messages, scored_text, scored_tokens
from lora_dpo_jax.data.sources import RowError, attempt

# exact: as in TRL. merged: a response was tokenized by itself. template: the end of the generation prompt was left out.
Boundary = Literal["exact", "merged", "template"]


NEEDS_SPANS = "format.train_on, format.mask_thinking and weights of messages need a tokenizer of `tokenizers`"


class _Texts(NamedTuple):
    """The texts of a prompt and of its conversations. Each text of `whole` is `prompt` followed by a response."""

    prompt: str
    whole: tuple[str, ...]
    boundary: Boundary
    scored: tuple[np.ndarray | None, ...] = ()  # of each response, bool [character]; None: all of it is scored


class ExampleTokenizer:
    """Tokenizes examples in batches with a Hugging Face tokenizer.

    `chat_template` replaces its chat template. `format` says what is scored of responses.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        format: FormatConfig = FormatConfig(),  # noqa: B008 (frozen)
    ):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.format = format
        self._leading = _leading_special_tokens(tokenizer)
        self._reserved = _names_of_the_renderer(tokenizer)

    def tokenize(self, examples: Iterable[Example | RowError]) -> list[tuple[TokenizedExample, Boundary] | RowError]:
        """Results in the order of `examples`. An example that cannot be tokenized gives a RowError with the reason."""
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
        """Token ids without the special tokens that the tokenizer would add, because the template writes its own."""
        if not texts:
            return []
        if is_plain_fast_tokenizer(self.tokenizer):
            backend = backend_of(self.tokenizer)
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore

    def _texts(self, example: Example) -> _Texts:
        if isinstance(example.prompt, str):
            texts = self._string_texts(example.prompt, [str(response) for response in example.responses])
            _reject_surrogates("".join(texts.whole), example.origin)
        else:
            texts = self._chat_texts(example)
        if len(texts.prompt) in map(len, texts.whole):
            raise RowError("empty", example.origin, "the chat template writes nothing for one of the responses")
        return texts._replace(scored=self._scored_texts(example, texts))

    def _scored_texts(self, example: Example, texts: _Texts) -> tuple[np.ndarray | None, ...]:
        start, masks = len(texts.prompt), []
        for name, response, text in zip(example.names, example.responses, texts.whole, strict=True):
            if isinstance(example.prompt, str) or isinstance(response, str):
                mask = scored_text(text, start, self.format)
            else:
                try:
                    render = functools.partial(self._render, example)
                    eos = str(self.tokenizer.eos_token or "")
                    mask = scored_messages(text, start, example.prompt, response, self.format, render=render, eos=eos)
                except UnclearTurnError as error:
                    raise RowError("boundary", example.origin, error.of_response(name)) from error
            if mask is not None and not mask.any():
                raise nothing_scored(name, example.origin)
            masks.append(mask)
        return tuple(masks)

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
            f"alone it continues with {_excerpt(prompt, shared)}, {', '.join(before)}. "
            "Change the messages, or set format.chat_template to a template that renders them alike",
        )

    def _end_without_generation_prompt(self, example: Example, prompt: str) -> str | None:
        """The longest beginning of the prompt's text that every conversation shares, whatever the answer.

        None if it lacks some of the prompt's messages, or if it ends within a token.
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
                [*map(without_weight, messages)],
                tools=example.tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **example.chat_template_kwargs,
            )
        except TemplateSyntaxError as error:
            whose = "the tokenizer's chat template" if self.chat_template is None else "format.chat_template"
            raise ValueError(f"{whose} is not valid Jinja: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template is a program, and may raise any type for odd messages
            raise RowError("malformed", example.origin, f"the chat template rejects it: {error}") from error
        _reject_surrogates(text, example.origin)
        return text

    def _split(
        self, example: Example, texts: _Texts, prompt: list[int], whole: list[list[int]]
    ) -> tuple[TokenizedExample, Boundary]:
        boundary = texts.boundary
        if example.implicit_prompt:
            # No text marks the end of the prompt, so it ends with the last whole token that all texts share.
            prompt = list(commonprefix([prompt, *whole]))
        responses, scored = [], []
        for ids, text, mask in zip(whole, texts.whole, texts.scored, strict=True):
            before, response = texts.prompt, text[len(texts.prompt) :]
            if ids[: len(prompt)] == prompt:
                ids = ids[len(prompt) :]
            else:
                before, ids = self._encode_alone(example, response, prompt, ids)
                boundary = "merged" if boundary == "exact" else boundary
            responses.append(self._without_second_eos(_array(ids)))
            scored.append(self._scored_tokens(before, response, ids, mask)[: len(responses[-1])])
        if isinstance(example.prompt, str):
            prompt = self._leading + prompt
        tokens = TokenizedExample(
            self._without_second_bos(_array(prompt)),
            tuple(responses),
            example.comparisons,
            example.weights,
            columns=example.columns,
            scored=None if all(mask.all() for mask in scored) else tuple(scored),
        )
        if not len(tokens.prompt):
            raise RowError(
                "empty", example.origin, "the prompt has no token to predict the first token of the responses from"
            )
        if not all(map(len, tokens.responses)):
            raise RowError("empty", example.origin, "one of the responses has no tokens")
        for name, mask in zip(example.names, scored, strict=True):
            if not mask.any():
                raise nothing_scored(name, example.origin)
        return tokens, boundary

    def _scored_tokens(self, before: str, response: str, ids: list[int], mask: np.ndarray | None) -> np.ndarray:
        """bool [token]: which of `ids`, the last tokens of `before + response`, are scored, from `mask` [character]."""
        if mask is None:
            return np.ones(len(ids), bool)
        encoding = self._with_spans.encode(before + response, add_special_tokens=False)
        if encoding.ids[len(encoding.ids) - len(ids) :] != ids:
            raise ValueError(f"{NEEDS_SPANS}, and this one gives other tokens when its Python code is left out")
        # What is before the response has no part in this, even where a token without a prompt of its own begins in it.
        is_scored = np.concatenate([np.ones(len(before), bool), mask])
        return scored_tokens(encoding.offsets[len(encoding.ids) - len(ids) :], is_scored)

    @functools.cached_property
    def _with_spans(self) -> Any:
        """The Rust tokenizer, whose encodings have the exact span of each token in the text."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise ValueError(f"{NEEDS_SPANS}; found: {type(self.tokenizer).__name__}")
        backend = tokenizers.Tokenizer.from_str(backend_of(self.tokenizer).to_str())
        backend.post_processor = None  # some take the spaces around a token out of its span
        return backend

    def _encode_alone(
        self, example: Example, response: str, prompt: list[int], whole: list[int]
    ) -> tuple[str, list[int]]:
        """Tokens of a response that, appended to those of the prompt, decode to the same text as `whole`.

        They are the last ones of the text that comes first, followed by the response.
        """
        expected = self._decode(whole)
        # Some tokenizers put a space before the beginning of a text. After an anchor, the response is no beginning.
        for anchor in ("", str(self.tokenizer.eos_token or ""), "\n", "a"):
            before, both = self.encode([anchor, anchor + response])
            if both[: len(before)] == before and self._decode(prompt + both[len(before) :]) == expected:
                return anchor, both[len(before) :]
        raise RowError(
            "boundary",
            example.origin,
            f"tokens merge over the end of the prompt ({_excerpt(self._decode(prompt[-4:]), 0)} before "
            f"{_excerpt(response, 0)}), and the tokenizer cannot encode the response by itself",
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
    """The example cut to train_seq_len by format.slice_strategy. Raises RowError if it must not or cannot be cut.

    left: removes the beginning of the prompt, except its BOS. right: removes the ends of the responses, as TRL's
    keep_start does. In both cases all responses keep the same prompt, and each part keeps at least one token. `names`
    are the names of the responses in errors.
    """
    if example.length <= train_seq_len:
        return example
    if strategy == "right" and len(example.prompt) < train_seq_len:
        return _with_shorter_responses(example, train_seq_len - len(example.prompt), origin, names)
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


def _with_shorter_responses(
    example: TokenizedExample, most: int, origin: str, names: Sequence[str]
) -> TokenizedExample:
    """The example with at most so many tokens of each response."""
    scored = example.scored
    if scored is not None:
        scored = tuple(mask[:most] for mask in scored)
        if cut := [name for name, mask in zip(names, scored, strict=True) if not mask.any()]:
            raise RowError("too_long", origin, f"cut to train_seq_len, the {cut[0]} response has no token to score")
    return replace(example, responses=tuple(response[:most] for response in example.responses), scored=scored)


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Rust tokenizer, without the truncation and padding that the last call may have left in it."""
    backend: Any = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def _leading_special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a plain text: a BOS, or none. Those after it are not used."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)  # type: ignore
    return full[:start]  # type: ignore


def _names_of_the_renderer(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Arguments that a row may not set: those that control the rendering, and those that the renderer sets itself."""
    functions = (type(tokenizer).apply_chat_template, render_jinja_template)
    names = {name for function in functions for name in inspect.signature(function).parameters}
    given = {"messages", "raise_exception", "strftime_now", *DEFAULT_NAMESPACE, *tokenizer.special_tokens_map}
    return (names | given) - {"documents"}  # documents are data, which templates for retrieval read


def is_plain_fast_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the Rust backend may be called directly (twice as fast): the tokenizer's Python code changes no text."""
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


def _reject_surrogates(text: str, origin: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("malformed", origin, "holds half of a surrogate pair, which is no character") from error


def _excerpt(text: str, start: int) -> str:
    return repr(text[start : start + 40])


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)
