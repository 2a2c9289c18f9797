"""The prompts of a run's rows, as they were before they became tokens."""

from collections.abc import Iterator
from typing import Any

from lora_dpo_jax.data.config import ComponentConfig
from lora_dpo_jax.data.rows import Example, read_example
from lora_dpo_jax.data.sources import Split, read_tables
from lora_dpo_jax.data.table import ExampleTable, why_none_is_held_out
from lora_dpo_jax.data.tokenizing import row_origin
from lora_dpo_jax.redaction import redacted
from lora_dpo_jax.runs.assembly import load_data
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.runs.prompts import Prompt


def row_prompts(config: TrainConfig, split: Split = "validation") -> list[Prompt]:
    """The prompts of the rows that a run trains on (`train`) or holds out, each once, in the order of the data.

    All processes must call this, because it tokenizes the rows to split them as the run does.
    """
    data = load_data(config)
    table = data.pairs if split == "train" else data.held_out
    if not len(table):
        why = why_none_is_held_out(data.pairs, config.held_out_fraction)
        raise ValueError(
            f"the run has no held-out prompts ({why}): set prompts_file, give data.components validation files, or "
            "raise validation_split_fraction"
        )
    has_validation = any(component.source.has_split("validation") for component in config.data.components.values())
    rows_of: Split = "validation" if split == "validation" and has_validation else "train"
    prompts: dict[str, Prompt] = {}
    for name, origins in _origins(table).items():
        for example in _examples(config.data.components[name], rows_of, origins):
            prompt = _prompt_of(example, config.data.components[name])
            prompts.setdefault(repr((prompt.content, prompt.template_kwargs)), prompt)
    return [*prompts.values()]


def _origins(table: ExampleTable) -> dict[str, set[str]]:
    """The origins of the table's examples, by component."""
    first, found = 0, {}
    for name, count in zip(table.names, table.counts, strict=True):
        found[name] = {table.origin(index) for index in range(first, first + count)}
        first += count
    return found


def _examples(component: ComponentConfig, split: Split, origins: set[str]) -> Iterator[Example]:
    """Reads the rows with these origins again, because a table holds tokens alone."""
    tables, left = component.source.tables(split) if origins else [], set(origins)
    for table, number, row in read_tables(tables):
        origin = row_origin(redacted(tables[table].name), number)  # as the table of tokens says it
        if origin in left:
            left.remove(origin)
            yield read_example(row, component.format, origin)
    if left:
        raise ValueError(f"{min(left)}: the row is no longer there; its file changed while it was read")


def _prompt_of(example: Example, component: ComponentConfig) -> Prompt:
    template, tools = component.format.template_text(), example.tools
    kwargs: dict[str, Any] = {} if template is None else {"chat_template": template}
    kwargs |= {} if tools is None else {"tools": tools}
    # Texts that are trained on as they are do not go through a template here either.
    return Prompt(example.prompt, example.origin, chat=False, template_kwargs=kwargs | {**example.chat_template_kwargs})
