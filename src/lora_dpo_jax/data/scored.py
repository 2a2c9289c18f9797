"""Which characters of a conversation are scored, by its turns, their weights and their thoughts; then which tokens.

    messages    ... | assistant                       | user           | assistant
    text        ... | <think>Hm</think>Hi<|im_end|>\\n | <|im_start|>... | Bye<|im_end|>\\n
    response        | ......................................................  everything after the prompt
    all_turns       | .................................                | ...  the model's own turns
    last_turn       |                                                  | ...

A turn begins where the template's generation prompt ends, and ends where the template begins the next message. A token
is scored only if all of its characters are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np

from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.messages import INPUT_ROLES, WEIGHT, Message
from lora_dpo_jax.data.sources import RowError

# render(messages, generation_prompt): the text that the chat template makes of them.
Render = Callable[[Sequence[Message], bool], str]


class UnclearTurnError(Exception):
    """The text does not show where a message, counted from 1 in its response, begins or ends."""

    def of_response(self, name: str) -> str:
        """The error in words."""
        return (
            f"message {self.args[0]} of the {name} response: the chat template writes it so that its turn has no exact "
            "beginning and end. Set format.train_on to response, or format.chat_template to a template that writes "
            "each message alike, whatever follows"
        )


def scored_text(text: str, start: int, format: FormatConfig) -> np.ndarray | None:
    """bool [character]: what is scored of `text` from `start` on, where one turn begins. None: all of it."""
    is_scored = np.ones(len(text) - start, bool)
    if format.mask_thinking:
        _leave_out_thoughts(is_scored, text, start, (start, len(text)), format)
    return None if is_scored.all() else is_scored


def scored_messages(
    text: str,
    start: int,
    prompt: Sequence[Message],
    response: Sequence[Message],
    format: FormatConfig,
    *,
    render: Render,
    eos: str,
) -> np.ndarray | None:
    """The same of a conversation's `text`, of which the response's messages begin at `start`. `eos` may end it.

    Raises UnclearTurnError if the text does not show where one of its turns is.
    """
    own = [number for number, message in enumerate(response) if message["role"] not in INPUT_ROLES]
    weighed = [number for number in own if response[number].get(WEIGHT, 1)]
    if format.scored_turns == "last_turn":
        weighed = [number for number in weighed if number == own[-1]]
    if len(response) == 1:
        return scored_text(text, start, format) if weighed else np.zeros(len(text) - start, bool)
    is_scored = np.full(len(text) - start, format.scored_turns == "response")
    needed = weighed
    if format.scored_turns == "response":
        needed = own if format.mask_thinking else [number for number in own if number not in weighed]
    for number in needed:
        turn = _Turn([*prompt, *response[:number]], response[number], response[number + 1 :], render)
        first, last = start if number == 0 else turn.first_character(text), turn.last_character(text, eos)
        if first is None or last is None or not start <= first < last:
            raise UnclearTurnError(number + 1)
        is_scored[first - start : last - start] = number in weighed
        if format.mask_thinking:
            _leave_out_thoughts(is_scored, text, start, (first, last), format)
    return None if is_scored.all() else is_scored


def scored_tokens(spans: Sequence[tuple[int, int]], is_scored: np.ndarray) -> np.ndarray:
    """bool [token]: whether each character of the token's span is scored. An empty span has the next character's."""
    before = np.concatenate([[0], np.cumsum(is_scored)])
    first, last = np.asarray(spans, np.int64).reshape(-1, 2).T
    last = np.minimum(np.maximum(last, first + 1), len(is_scored))
    first = np.minimum(first, last - 1)
    return before[last] - before[first] == last - first


def thinking_blocks(text: str, tags: Sequence[str], is_open: bool = False) -> Iterator[tuple[int, int]]:
    """(first character, the one after the last) of each block, its tags included.

    `is_open`: a block is open at the beginning, as it is too if a closing tag comes first. A block that is not closed
    ends with the text.
    """
    opening, closing = tags
    begin, end = text.find(opening), text.find(closing)
    if is_open or 0 <= end < (begin if begin >= 0 else len(text)):
        begin = 0
    while begin >= 0:
        end = text.find(closing, begin)
        end = len(text) if end < 0 else end + len(closing)
        yield begin, end
        begin = text.find(opening, end)


def _leave_out_thoughts(
    is_scored: np.ndarray, text: str, start: int, turn: tuple[int, int], format: FormatConfig
) -> None:
    """Changes `is_scored`, of `text` from `start` on, in the blocks of one turn."""
    first, last = turn
    tags = format.thinking_tags
    is_open = text[:first].rstrip().endswith(tags[0])  # by the generation prompt
    for begin, end in thinking_blocks(text[first:last], tags, is_open):
        is_scored[first + begin - start : first + end - start] = False


@dataclass(frozen=True)
class _Turn:
    """A message of the model in its conversation, and how the template writes it."""

    before: list[Message]
    message: Message
    following: Sequence[Message]
    render: Render

    def first_character(self, text: str) -> int | None:
        """The end of the generation prompt, or of as much of it as the conversation has, whatever the message says."""
        prompt = self.render(self.before, True)
        if text.startswith(prompt):
            return len(prompt)
        shared = commonprefix([prompt, text, *self._probes(self.following)])
        return len(shared) if shared.startswith(self.render(self.before, False)) else None

    def last_character(self, text: str, eos: str) -> int | None:
        """The end of what the template writes after the message's content and before the next message."""
        if not self.following:
            return len(text)
        until_here = self.render([*self.before, self.message], False)
        if text.startswith(until_here):
            return len(until_here)
        # A template that writes a message otherwise once others follow, such as without its thoughts.
        after, alone = _common_suffix(self._probes(self.following)), _common_suffix(self._probes([]))
        for ending in (alone, alone.removesuffix(eos)):  # some end whole conversations by it, Phi-3's among them
            if ending and text.endswith(after) and after.startswith(ending):
                return len(text) - len(after) + len(ending)
        return None

    def _probes(self, following: Sequence[Message]) -> list[str]:
        """Two texts of the conversation that differ in the message's content alone: all else is the template's."""
        # Some templates write a call and no content. The message is then replaced by a content alone.
        for kept in (self.message, {"role": self.message["role"]}):
            messages: list[Message] = [{**kept, "content": content} for content in ("A", "B")]
            texts = [self.render([*self.before, message, *following], False) for message in messages]
            if texts[0] != texts[1]:
                break
        return texts


def _common_suffix(texts: Sequence[str]) -> str:
    return commonprefix([text[::-1] for text in texts])[::-1]


def nothing_scored(name: str, origin: str) -> RowError:
    return RowError(
        "empty",
        origin,
        f"no token of the {name} response is scored: its messages have weight 0, or are left out by "
        "format.train_on, or hold only thoughts that format.mask_thinking leaves out",
    )
