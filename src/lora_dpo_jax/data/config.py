"""The `data:` section of a config."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_dpo_jax.columns import LABEL, MARGIN, WEIGHT
from lora_dpo_jax.data.sources import Reason, SourceConfig
from lora_dpo_jax.places import is_url, spelled_alike
from lora_dpo_jax.settings.choices import check_choices

SliceStrategy = Literal["raise", "drop", "left", "right"]
Comparisons = Literal["all", "best_worst", "adjacent"]

# The settings of a row's optional columns, with their default column names.
COLUMN_SETTINGS = {
    "prompt_field": "prompt",
    "system_prompt": "system",
    "tools_field": "tools",
    "chat_template_kwargs": "chat_template_kwargs",
}


@dataclass(frozen=True)
class FormatConfig:
    """The columns that hold a row's parts, and what happens to invalid rows. The shape is detected for each row.

    As in Levanter, `system_prompt` and `chat_template_kwargs` are names of columns, not their values.
    """

    # preference_chat: a chosen and a rejected response. unpaired: one response and whether it is a desirable one.
    # ranked: a list of responses with a score or a rank for each. supervised: one response to imitate
    type: Literal["preference_chat", "unpaired", "ranked", "supervised"] = "preference_chat"
    chosen_field: str = "chosen"  # a column
    rejected_field: str = "rejected"  # a column
    completion_field: str = "completion"  # a column, of unpaired and supervised rows
    label_field: str = "label"  # a column of true and false, of unpaired rows
    label: bool | None = None  # of all rows, if they are unpaired and label_field is no column
    responses_field: str = "responses"  # a column of lists, of ranked rows
    scores_field: str = "scores"  # a column of lists of numbers, of ranked rows; a higher score is better
    ranks_field: str = "ranks"  # the same, of ranked rows without scores; a lower rank is better
    # Of ranked rows. all: each response with each worse one. best_worst: the best with the worst one. adjacent: each
    # with the next in order.
    comparisons: Comparisons = "all"
    # Responses with equal scores. drop: they are not compared. both_ways: each is preferred to the other, with half the
    # weight.
    ties: Literal["drop", "both_ways"] = "drop"
    weight_field: str | None = None  # a column of numbers: by which a row's loss is multiplied
    margin_field: str | None = None  # a column of numbers: the margin of rewards that a pair should have
    prompt_field: str | None = "prompt"  # null: the prompt is what chosen and rejected share
    system_prompt: str | None = "system"  # the column of a system message
    tools_field: str | None = "tools"  # the column of tool schemas
    chat_template_kwargs: str | None = "chat_template_kwargs"  # the column of arguments for the template
    columns: list[str] = field(default_factory=list)  # columns that the loss reads; each row has a number
    # Columns that the loss reads; each row has a list of numbers, one for each response.
    response_columns: list[str] = field(default_factory=list)
    chat_template: str | None = None  # instead of the tokenizer's own: a Jinja text, or the path of one
    # Rows of strings. plain: as they are. chat: the prompt is the user's turn, a response the assistant's.
    # auto: chat if chat_template is set, or if the row has what only a template can write; else plain.
    strings: Literal["auto", "plain", "chat"] = "auto"
    # What is scored of a response of several turns. response: everything after the prompt. all_turns: the model's own
    # turns. last_turn: the last of them. null: response, as in TRL's DPOTrainer; of supervised rows, all_turns.
    train_on: Literal["response", "all_turns", "last_turn"] | None = None
    mask_thinking: bool = False  # leave blocks of thoughts in responses out of what is scored
    thinking_tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])  # around such a block
    slice_strategy: SliceStrategy = "raise"  # for rows longer than train_seq_len
    invalid_rows: Literal["raise", "drop"] = "raise"  # empty, malformed, identical, or without a clear prompt boundary

    def __post_init__(self):
        check_choices(self, "format")
        names = [*self.columns, *self.response_columns]
        if self.margin_field is not None:
            names.append(MARGIN)
            if self.type != "preference_chat":
                raise ValueError(
                    f"format.margin_field={self.margin_field!r} is the margin between the two responses of a pair; "
                    f"found format.type={self.type}"
                )
        if self.type == "unpaired":
            names += [LABEL, WEIGHT]
        elif self.type == "supervised" and self.weight_field is not None:
            names.append(WEIGHT)
        if self.type != "unpaired" and self.label is not None:
            raise ValueError(f"format.label={self.label} is for format.type=unpaired; found format.type={self.type}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"format.columns and format.response_columns name {twice} twice, or as columns of numbers that the "
                "format has itself; needed: once"
            )
        tags = self.thinking_tags
        if len(tags) != 2 or not all(tag.strip() for tag in tags) or tags[0] == tags[1]:
            raise ValueError(
                f"format.thinking_tags={tags!r} must be two texts: the tag that opens a block of thoughts, and the tag "
                "that closes it"
            )

    @property
    def scored_turns(self) -> Literal["response", "all_turns", "last_turn"]:
        """`train_on`, with what its null stands for."""
        return self.train_on or ("all_turns" if self.type == "supervised" else "response")

    @property
    def named_columns(self) -> dict[str, str]:
        """Setting -> column, of the columns that the user named: all but the defaults."""
        columns = {setting: getattr(self, setting) for setting in COLUMN_SETTINGS}
        named = {name: column for name, column in columns.items() if column not in (None, COLUMN_SETTINGS[name])}
        for setting in ("weight_field", "margin_field"):
            if (column := getattr(self, setting)) is not None:
                named[setting] = column
        for setting, names in (("columns", self.columns), ("response_columns", self.response_columns)):
            named |= {f"{setting}[{number}]": column for number, column in enumerate(names)}
        return named

    def refuses(self, reason: Reason) -> bool:
        """Whether a row with this fault is an error. Otherwise it is dropped and counted."""
        if reason == "tied":
            return False  # no fault of the row: it only says nothing about preferences
        return (self.slice_strategy if reason == "too_long" else self.invalid_rows) == "raise"

    def template_text(self) -> str | None:
        """The overriding template, read from its file if a path was given."""
        return None if self.chat_template is None else read_template("format.chat_template", self.chat_template)


@dataclass(frozen=True)
class ComponentConfig:
    source: SourceConfig
    format: FormatConfig = field(default_factory=FormatConfig)


@dataclass(frozen=True)
class PreferenceDataConfig:
    components: dict[str, ComponentConfig]  # by name
    tokenizer: str | None = None  # id or folder; null: the one of initialize_from_hf
    shuffle: bool = True  # a new seeded order in each epoch; false keeps the order of the files
    train_weights: dict[str, float] | None = None  # how often each component is drawn; null: in proportion to its pairs
    cache_dir: str | None = None  # null: $LORA_DPO_JAX_CACHE, or lora_dpo_jax in the user's cache folder
    num_proc: int | None = None  # processes that tokenize; null: a core each, at most 16; 1 on fewer than 4 cores

    def __post_init__(self):
        if not self.components:
            raise ValueError("data.components is empty; name at least one component with its source")
        if self.cache_dir is not None and is_url(self.cache_dir):
            raise ValueError(f"data.cache_dir={self.cache_dir!r} must be a folder of this machine")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"data.num_proc={self.num_proc} must be at least 1; null chooses by the number of cores")
        if self.train_weights is not None:
            self._check_weights(self.train_weights)

    def _check_weights(self, weights: dict[str, float]) -> None:
        unknown, missing = sorted(set(weights) - set(self.components)), sorted(set(self.components) - set(weights))
        if unknown:
            raise ValueError(f"data.train_weights names {unknown}; the components are {sorted(self.components)}")
        if missing:
            raise ValueError(
                f"data.train_weights has no weight for {missing}. Give each one; 0 keeps a component out of training"
            )
        # Written so that NaN is rejected too.
        if bad := {name: weight for name, weight in weights.items() if not 0 <= weight < float("inf")}:
            raise ValueError(f"data.train_weights must be finite and not negative; found {bad}")
        if not sum(weights.values()) > 0:
            raise ValueError(f"data.train_weights={weights} are all zero; at least one must be positive")
        for name, weight in weights.items():
            if weight > 0 and not self.components[name].source.has_split("train"):
                raise ValueError(f"data.train_weights.{name}={weight}, but {name} has no training rows (train_urls)")


def read_template(setting: str, template: str) -> str:
    """A chat template, given as its Jinja text or as the path of a file; errors name the setting."""
    if "{{" in template or "{%" in template:
        return template
    path = os.path.expanduser(template)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{setting}={template!r} is neither a Jinja template nor a file{spelled_alike(path)}")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}={template!r} cannot be read as UTF-8 text: {error}") from error
