"""Rows in the shapes and files of other tools: what docs/data.md shows, and one set of rows in every kind of file."""

import csv
import io
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lora_dpo_jax.data.cache import tokenize_component
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.data.sources import HubSource, UrlSource

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
[SECTION] = re.findall(r"\n## Rows\n(.*?)\n## ", PAGE, flags=re.DOTALL)
BLOCKS = re.findall(r"```json\n(.*?)```", SECTION, flags=re.DOTALL)
EXAMPLES = [json.loads(row) for block in BLOCKS for row in re.split(r"\n(?=\{)", block)]


@pytest.mark.parametrize("row", EXAMPLES, ids=[",".join(row) for row in EXAMPLES])
def test_each_example_of_the_documentation_is_shown_as_the_same_pair(row, make_tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    types = {"label": "unpaired", "responses": "ranked", "completion": "supervised"}
    types |= {"messages": "supervised"} if len(row) == 1 else {}
    format = FormatConfig(type=next((types[column] for column in types if column in row), "preference_chat"))
    source = UrlSource([str(tmp_path / "rows.jsonl")])
    tokenizer, component = make_tokenizer("chatml"), ComponentConfig(source, format=format)
    pairs = tokenize_component(component, tokenizer, split="train", train_seq_len=64, cache_dir=tmp_path / "cache")
    shown = io.StringIO()
    preview(pairs, tokenizer, 1, shown)
    parts = re.split(r"--- ([\w ,]+) \(.*\)\n", shown.getvalue().rstrip())[1:]
    prompt = {"prompt": "<|im_start|>user↵\nCapital of France?<|im_end|>↵\n<|im_start|>assistant↵\n\n"}
    if "label" in row:
        answers = {"desirable": "Paris.<|im_end|>↵"}
    elif "completion" in row:
        answers = {"response 1": "Paris.<|im_end|>↵"}
    elif len(row) == 1 and "messages" in row:
        answers = {
            "response 1, tokens 1 to 5 of 30": "Paris.<|im_end|>↵\n\n",
            "response 1, tokens 6 to 23 of 30": prompt["prompt"].replace("Capital of France?", "And of Italy?"),
            "response 1, tokens 24 to 30 of 30": "Rome.<|im_end|>↵",
        }
    elif "responses" in row:
        answers = {"response 1": "Lyon.<|im_end|>↵\n\n", "response 2": "Paris.<|im_end|>↵\n\n"}
        answers["response 3"] = "Paris, on the Seine.<|im_end|>↵"
    else:
        answers = {"chosen": "Paris.<|im_end|>↵\n\n", "rejected": "Lyon.<|im_end|>↵"}
    assert dict(zip(parts[::2], parts[1::2], strict=True)) == prompt | answers


def test_the_documentation_has_an_example_of_each_shape():
    assert len(EXAMPLES) == 17


def message(role, content, **keys):
    return {"role": role, "content": content, **keys}


def calls(*functions):
    return message("assistant", None, tool_calls=[{"type": "function", "function": function} for function in functions])


def function(name, **arguments):
    return {"name": name, "arguments": arguments}


def schema(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


WEATHER = schema("weather", town={"type": "string"}, days={"type": ["integer", "null"], "default": None})
CALENDAR = schema("calendar", day={"type": "string", "enum": ["Monday", None]})


def varied_row(n):
    """Each row has some of: tools, nulls that are data, parts, arguments as text, a system message, several turns."""
    parts = [{"type": "text", "text": "Rain, "}, {"type": "text", "text": f"{n}?"}]
    question = message("user", [parts, f"Rain, {n}?", parts[1:]][n % 3])
    weather, calendar = function("weather", town="Bern", days=None), function("calendar", day={"name": None, "n": n})
    if n % 4 == 3:
        calendar["arguments"] = json.dumps(calendar["arguments"])
    call = [calls(weather), calls(calendar), calls(weather, calendar), calls(function("now"))][n % 4]
    answer = message("tool", '{"rain": null}', name="weather")
    prompt = [message("system", "Be brief.")] * (n % 2) + [question] + [call, answer] * (n % 5 == 0)
    return {
        "prompt": prompt,
        "chosen": [call, answer, message("assistant", f"It rains, {n}.")] if n % 3 else [message("assistant", parts)],
        "rejected": [message("assistant", "No."), message("user", "Sure?"), message("assistant", "[1]")],
        "tools": [[WEATHER], [WEATHER, CALENDAR], []][n % 3],
    }


ROWS = [varied_row(n) for n in range(20)]
FILES = ("rows.jsonl", "rows.json", "read.parquet", "made.parquet", "rows.csv")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ROWS in every kind of file, as `datasets` (with its type Json) and Python write them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    (tmp_path / "hub").mkdir()
    for file in ("rows.jsonl", "hub/train.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*ROWS[0]])
        writer.writeheader()
        writer.writerows({column: json.dumps(value) for column, value in row.items()} for row in ROWS)
    read = datasets.load_dataset(str(tmp_path / "hub"), split="train")
    made = datasets.Dataset.from_list(ROWS, on_mixed_types="use_json")
    read.to_parquet(tmp_path / "read.parquet")
    made.to_parquet(tmp_path / "made.parquet")
    made.save_to_disk(tmp_path / "saved")
    return tmp_path


def tokens_of(source, tokenizer, cache_dir):
    pairs = tokenize_component(
        ComponentConfig(source), tokenizer, split="train", train_seq_len=1024, cache_dir=cache_dir
    )
    return [tuple(part.tolist() for part in pair.parts) for pair in pairs]


def test_the_same_rows_give_the_tokens_of_trl_from_every_kind_of_file(folder, make_tokenizer, trl_pairs):
    tokenizer = make_tokenizer("tools")
    sources = {file: UrlSource([str(folder / file)]) for file in FILES}
    sources |= {name: HubSource(str(folder / name)) for name in ("hub", "saved")}
    tokens = {name: tokens_of(source, tokenizer, folder / "cache") for name, source in sources.items()}
    expected = trl_pairs(datasets.Dataset.from_list(ROWS, on_mixed_types="use_json"), tokenizer)
    assert {name: found == expected for name, found in tokens.items()} == dict.fromkeys(sources, True)


@pytest.mark.parametrize(
    "called",
    [
        [("now", {"town": "Bern"}), ("rain", {"day": "Monday"})],  # keys of the other function, filled by Arrow
        [("now", {"town": "Bern", "days": None}), ("now", {"town": "Thun", "days": 2})],  # the writer's own null
    ],
)
def test_a_table_of_structs_gives_the_tokens_of_json_lines(called, tmp_path, make_tokenizer):
    answers = [calls(function(name, **given)) for name, given in called]
    rows = [{**ROWS[1], "chosen": [answer, message("assistant", "Yes")]} for answer in answers]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer("tools")
    table, lines = (
        tokens_of(UrlSource([str(tmp_path / f"rows.{kind}")]), tokenizer, tmp_path / "cache")
        for kind in ("parquet", "jsonl")
    )
    assert table == lines
    assert json.dumps(called[0][1]) in tokenizer.decode(table[0][1])
