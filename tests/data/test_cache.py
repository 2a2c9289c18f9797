import gzip
import json
import os
import time

import numpy as np
import pytest
from tiny_disks import no_file_larger_than
from transformers import AutoTokenizer

from lora_dpo_jax.data import cache
from lora_dpo_jax.data.cache import load_examples, tokenize_component
from lora_dpo_jax.data.chat import ExampleTokenizer
from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.data.sources import RowError, SourceError, UrlSource


def row(question, chosen, rejected):
    def conversation(answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    return {"chosen": conversation(chosen), "rejected": conversation(rejected)}


ROWS = [row(f"What is {n % 200}?", f"The answer is {n}.", "The cat sat." * (n % 3 + 1)) for n in range(600)]
FAULTY = [
    row("Hello", "Hi", "No"),
    row("Hello", "", "No"),
    row("Hello", "Same", "Same"),
    {"chosen": 5, "rejected": "no"},
    row("Hello", "cat " * 100, "No"),
    row("cat " * 100, "Hi", "No"),
]


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer("chatml")


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


@pytest.fixture
def load(tmp_path, tokenizer):
    """load(url, **format settings): tokenized and cached under tmp_path."""

    def load(url, tokenizer=tokenizer, train_seq_len=128, **format):
        component = ComponentConfig(UrlSource([url]), FormatConfig(**format))
        return tokenize_component(
            component, tokenizer, split="train", train_seq_len=train_seq_len, cache_dir=tmp_path / "cache"
        )

    return load


@pytest.fixture
def tokenized_rows(monkeypatch):
    """How many rows have gone through the tokenizer."""
    counts = []
    original = ExampleTokenizer.tokenize

    def counting(self, pairs):
        results = original(self, pairs)
        counts.append(len(results))
        return results

    monkeypatch.setattr(ExampleTokenizer, "tokenize", counting)
    return lambda: sum(counts)


def test_pairs_from_disk_are_the_tokens_of_their_rows(write, load, tokenizer):
    path = write(ROWS, "rows.jsonl.gz")
    pairs = load(path)
    expected = ExampleTokenizer(tokenizer).tokenize(read_example(row, FormatConfig(), "") for row in ROWS)
    assert len(pairs) == len(ROWS) == pairs.report["rows"] == pairs.report["kept"]
    for index, (pair, (tokens, _)) in enumerate(zip(pairs, expected, strict=True)):
        for ours, theirs in zip(pair.parts, tokens.parts, strict=True):
            assert ours.dtype == np.int32
            np.testing.assert_array_equal(ours, theirs)
        assert pairs.arrays.sizes.tokens[index] == sum(map(len, pair.parts))
        assert pairs.origin(index) == f"{path}, row {index + 1}"
    with pytest.raises(IndexError):
        pairs[len(pairs)]


def test_pairs_have_equal_hashes_when_they_have_equal_prompts(write, load):
    pairs = load(write(ROWS))
    assert pairs.prompt_hashes.dtype == np.uint64
    assert len(np.unique(pairs.prompt_hashes)) == 200
    np.testing.assert_array_equal(pairs.prompt_hashes[:200], pairs.prompt_hashes[200:400])


def test_prompts_that_were_cut_differently_still_have_equal_hashes(write, load):
    rows = [row("cat " * 50, "Hi", "cat " * n) for n in (5, 20)]
    pairs = load(write(rows), train_seq_len=60, slice_strategy="left")
    assert pairs.report["truncated"] == 2
    assert pairs.arrays.prompt_tokens[0] != pairs.arrays.prompt_tokens[1]
    assert pairs.prompt_hashes[0] == pairs.prompt_hashes[1]


def test_rows_are_tokenized_once(write, load, tokenized_rows):
    path = write(ROWS)
    first = load(path)
    again = load(path)
    assert tokenized_rows() == len(ROWS)
    assert first.fingerprint == again.fingerprint
    np.testing.assert_array_equal(first[17].responses[0], again[17].responses[0])
    assert again.report == first.report


def test_a_tokenizer_saved_and_loaded_finds_the_same_cache(write, load, tokenizer, tokenized_rows, tmp_path):
    path = write(ROWS)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    first = load(path, loaded)
    loaded(["Hello", "Hello there"], padding=True, truncation=True, max_length=4)  # leaves its settings in the backend
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "elsewhere")
    second = load(path, AutoTokenizer.from_pretrained(tmp_path / "elsewhere"))
    assert load(path, loaded).fingerprint == first.fingerprint == second.fingerprint
    assert tokenized_rows() == len(ROWS)


@pytest.mark.parametrize("what", ["rows", "template", "override", "tokens", "length", "strategy", "invalid", "version"])
def test_whatever_shapes_the_pairs_changes_their_fingerprint(what, write, load, make_tokenizer, monkeypatch):
    path = write(ROWS)
    before = load(path)
    tokenizer, options = make_tokenizer("chatml"), {}
    if what == "rows":
        write([*ROWS, row("one", "more", "row")])
    elif what == "template":
        tokenizer.chat_template += " "
    elif what == "override":
        options["chat_template"] = tokenizer.chat_template + " "
    elif what == "tokens":
        tokenizer.add_tokens(["answer"])
    elif what == "version":
        monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    else:
        options = {"length": {"train_seq_len": 127}, "strategy": {"slice_strategy": "drop"}}.get(
            what, {"invalid_rows": "drop"}
        )
    assert load(path, tokenizer, **options).fingerprint != before.fingerprint


@pytest.mark.parametrize("file", ["tokens.bin", "response_tokens.npy", "origins.npy", "prompt_hashes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_noticed_and_made_again(file, damage, write, load, tokenized_rows, tmp_path, caplog):
    path = write(ROWS[:20])
    expected = [[part.tolist() for part in pair.parts] for pair in load(path)]
    [damaged] = (tmp_path / "cache").rglob(file)
    content = damaged.read_bytes()
    if damage == "gone":
        damaged.unlink()
    else:
        damaged.write_bytes(content[:-7] if damage == "cut" else content[:-7] + bytes(7))
    assert [[part.tolist() for part in pair.parts] for pair in load(path)] == expected
    assert tokenized_rows() == 40
    assert "damaged" in caplog.text
    load(path)
    assert tokenized_rows() == 40
    assert len(list((tmp_path / "cache" / "examples").iterdir())) == 1


def test_a_failure_leaves_nothing_in_the_cache(write, load, tmp_path):
    with pytest.raises(RowError):
        load(write(FAULTY))
    assert list((tmp_path / "cache" / "examples").iterdir()) == []


def test_what_was_killed_while_it_wrote_is_removed_a_day_later(write, load, tmp_path):
    folder, now, day = tmp_path / "cache" / "examples", time.time(), 24 * 3600
    for name, age in {"killed": day + 60, "writing": day - 60}.items():
        building = folder / f".building-{name}"
        building.mkdir(parents=True)
        (building / "tokens.bin").write_bytes(b"1234")
        for path in (building / "tokens.bin", building):
            os.utime(path, (now - age, now - age))
    pairs = load(write(ROWS[:10]))
    assert sorted(path.name for path in folder.iterdir()) == [".building-writing", pairs.fingerprint]


def test_a_full_disk_leaves_nothing_in_the_cache(write, load, tmp_path):
    path = write(ROWS)
    with no_file_larger_than(2000), pytest.raises(OSError, match="^data.cache_dir: the tokenized examples could not"):
        load(path)
    assert list((tmp_path / "cache" / "examples").iterdir()) == []
    assert len(load(path)) == len(ROWS)


def test_the_slower_of_two_processes_takes_what_the_faster_made(write, load, tmp_path, monkeypatch):
    path = write(ROWS[:20])
    faster = load(path)
    monkeypatch.setattr(cache, "_open", lambda folder, open=cache._open, calls=[]: calls.append(1) or (
        None if len(calls) == 1 else open(folder)))  # fmt: skip
    slower = load(path)
    np.testing.assert_array_equal(slower[3].responses[0], faster[3].responses[0])
    assert len(list((tmp_path / "cache" / "examples").iterdir())) == 1


@pytest.mark.parametrize(
    ("row_number", "message"),
    [
        (2, "row 2: the chosen response is empty"),
        (3, "row 3: chosen and rejected are the same"),
        (4, "row 4: 'chosen' is int 5"),
        (5, r"row 5: prompt \+ chosen is 1\d\d tokens, more than train_seq_len=90. Raise train_seq_len, or set"),
    ],
)
def test_a_row_that_does_not_fit_is_an_error_that_names_it(row_number, message, write, load):
    blank = [FAULTY[0]] * (row_number - 1)
    with pytest.raises(RowError, match=r"rows.jsonl, " + message):
        load(write([*blank, FAULTY[row_number - 1]]), train_seq_len=90)


def test_a_row_that_is_not_json_is_told_how_to_be_dropped(write, load, tmp_path):
    path = write(ROWS[:3])
    with open(path, "a") as file:
        file.write('{"chosen": "cut')
    advice = "fix the row, or set data.components.data.format.invalid_rows to drop"
    with pytest.raises(
        RowError, match=rf"rows.jsonl, row 4: is not JSON: it breaks off after 15 characters: {advice}$"
    ):
        load(path)
    assert load(path, invalid_rows="drop").report["malformed"] == 1


def test_rows_that_do_not_fit_may_be_dropped_and_are_counted(write, load, caplog):
    path = write(FAULTY)
    pairs = load(path, train_seq_len=90, slice_strategy="drop", invalid_rows="drop")
    counts = {"rows": 6, "kept": 1, "empty": 1, "identical": 1, "malformed": 1, "too_long": 2}
    assert {reason: pairs.report[reason] for reason in counts} == counts
    assert "1 of 6 rows kept, 5 dropped: 1 empty; 1 malformed; 1 with identical responses; 2 too long" in caplog.text
    assert [pairs.origin(index) for index in range(len(pairs))] == [f"{path}, row 1"]


@pytest.mark.parametrize(("strategy", "kept"), [("left", [1, 6]), ("right", [1, 5])])
def test_long_rows_may_be_cut_and_are_counted(strategy, kept, write, load):
    pairs = load(write(FAULTY), train_seq_len=90, slice_strategy=strategy, invalid_rows="drop")
    assert [int(pairs.origin(index).split()[-1]) for index in range(len(pairs))] == kept
    assert (pairs.report["truncated"], pairs.report["too_long"]) == (1, 1)
    assert max(pair.length for pair in pairs) == 90


def test_responses_that_are_alike_once_cut_are_identical(write, load):
    rows = [FAULTY[0], row("Hello", "cat " * 40 + "one", "cat " * 40 + "two")]
    pairs = load(write(rows), train_seq_len=30, slice_strategy="right", invalid_rows="drop")
    assert pairs.report["identical"] == 1 and len(pairs) == 1


STRING_ROWS = [{"prompt": f"The cat {n}", "chosen": " sat there.", "rejected": " is good."} for n in range(3)]


def test_plain_strings_beside_a_chat_template_are_warned_of_once(write, load, make_tokenizer, caplog):
    path = write(STRING_ROWS)
    plain = load(path)
    assert plain.report["plain"] == 3
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "3 kept as plain strings although the tokenizer has a chat template, which servers apply: set"
        in warning.message
    )
    caplog.clear()
    for told in ({"strings": "plain"}, {"strings": "chat"}, {"tokenizer": make_tokenizer()}):
        load(path, **told)
    load(write(ROWS[:3]))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_strings_are_turns_where_the_config_brings_a_template(write, load, tokenizer):
    path = write(STRING_ROWS)
    turns = load(path, strings="chat")
    assert tokenizer.decode(turns[0].responses[0]) == " sat there.<|im_end|>\n"
    brought = load(path, chat_template=tokenizer.chat_template)
    assert [*map(str, brought)] == [*map(str, turns)]
    assert brought.report["plain"] == 0


def test_tools_that_a_table_has_filled_are_warned_of(write, load, caplog):
    properties = {"a": {"type": "string"}, "b": None}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}]
    pairs = load(write([{**ROWS[0], "tools": tools}, ROWS[1]]))
    assert pairs.report["filled"] == 1 and "1 with tools that have null for a parameter" in caplog.text


def test_a_component_without_any_pair_is_an_error(write, load):
    with pytest.raises(ValueError, match=r"No row is left in data.components.data \(train\): 0 of 1 rows kept"):
        load(write([FAULTY[1]]), invalid_rows="drop")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.jsonl", "rows.jsonl holds no rows"),
        ("rows.parquet", "rows.parquet: cannot be read: "),
        ("rows.jsonl.gz", "rows.jsonl.gz: cannot be read beyond row 1: "),
        ("gone.jsonl", "gone.jsonl does not exist"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_component(name, message, load, tmp_path):
    whole = gzip.compress(json.dumps(ROWS[0]).encode() + b"\n" + json.dumps(ROWS[1]).encode() * 9)
    (tmp_path / "rows.jsonl").write_bytes(b"")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(SourceError, match=f"^data.components.data.source: {tmp_path}/{message}"):
        load(str(tmp_path / name))


def test_a_column_named_in_the_config_must_exist(write, load):
    with pytest.raises(ValueError, match=r"format.system_prompt='Be brief.' names a column that no row has"):
        load(write(ROWS[:3]), system_prompt="Be brief.")


def test_each_component_that_has_the_split_is_loaded(write, tokenizer, tmp_path):
    rows, held_out = write(ROWS[:30]), write(ROWS[30:40], "held_out.jsonl")
    config = PreferenceDataConfig(
        {
            "both": ComponentConfig(UrlSource([rows], [held_out])),
            "train_only": ComponentConfig(UrlSource([held_out])),
        },
        cache_dir=str(tmp_path / "cache"),
    )
    train, validation = load_examples(config, tokenizer, train_seq_len=128)
    assert {name: len(pairs) for name, pairs in train.items()} == {"both": 30, "train_only": 10}
    assert {name: len(pairs) for name, pairs in validation.items()} == {"both": 10}
    assert validation["both"].fingerprint == train["train_only"].fingerprint


def test_several_files_are_numbered_each_for_itself(write, load, tmp_path):
    paths = [write(ROWS[:3], "a.jsonl"), write(ROWS[3:7], "b.jsonl")]
    pairs = load(str(tmp_path / "*.jsonl"))
    assert [pairs.origin(index) for index in (2, 3)] == [f"{paths[0]}, row 3", f"{paths[1]}, row 1"]


def test_ranked_rows_without_any_preference_are_dropped_and_counted(write, load):
    rows = [{"prompt": "Hi", "responses": ["a", "b", "c"], "scores": [n, n, 1]} for n in (3, 1, 2)]
    examples = load(write(rows), type="ranked")
    assert len(examples) == 2 and examples.report["tied"] == 1 and examples.report["rows"] == 3
    assert [len(example.responses) for example in examples] == [3, 3]
    assert [example.comparisons for example in examples] == [((0, 2), (1, 2))] * 2
