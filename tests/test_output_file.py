"""`--output` of evaluate and generate replaces a former output alone, in one piece, and is tried before the work."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.main import evaluate, generate
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.runs import systems

COLUMNS = ("prompt", "completion")
FORMER = json.dumps({"completion": "b", "prompt": "a"}) + "\n"


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The working folder, with a model and all that the commands can read."""
    shutil.copytree(instruct_folder(), tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", preference_rows(4))
    (tmp_path / "prompts.jsonl").write_text(FORMER)
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "link").symlink_to("prompts.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def no_work(*args, **kwargs):
    pytest.fail("the work began")


INPUTS = ["train.jsonl", "config.yaml", "template.jinja", "model/model.safetensors", "model/config.json"]
INPUTS += ["model/tokenizer.json", "./model/../train.jsonl"]


@pytest.mark.parametrize("output", INPUTS)
def test_evaluate_replaces_no_input(home, monkeypatch, output):
    run = run_config(home, home / "train.jsonl", initialize_from_hf="model")
    fields = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    monkeypatch.setattr(evaluate, "load_data", no_work)
    before = listing(home)
    with pytest.raises(
        FileExistsError, match=f"^output='{output}' (would replace a file of data.comp|exists and is not)"
    ):
        evaluate.main(evaluate.EvaluateConfig(**fields, output=output))
    assert listing(home) == before


@pytest.mark.parametrize("output", [*INPUTS, "prompts.jsonl", "link", "../HOME/prompts.jsonl"])
def test_generate_replaces_no_input(home, monkeypatch, output):
    output = output.replace("HOME", home.name)
    monkeypatch.setattr(systems, "local_folder", no_work)
    before = listing(home)
    given = ["--model", "model", "--prompts_file", "prompts.jsonl", "--chat_template", "template.jinja"]
    with pytest.raises(FileExistsError, match=f"^output='{output}' (would replace a file of|exists and is not)"):
        generate.main(generate.parse([*given, "--output", output]))
    assert listing(home) == before


@pytest.mark.parametrize(
    "output", ["prompts.jsonl/x.jsonl", "/proc/x.jsonl", "/dev/null/x.jsonl", "nowhere://x/y.jsonl", "loop", "loop/x"]
)
def test_an_output_that_cannot_be_written_is_told_before_the_work(home, monkeypatch, output):
    (home / "loop").symlink_to("loop")
    monkeypatch.setattr(systems, "local_folder", no_work)
    with pytest.raises(OSError, match="^output: nothing can be written to "):
        generate.main(generate.parse(["--model", "model", "--prompt", "x", "--output", output]))


@pytest.mark.parametrize("output", ["", "model", ".", "model/"])
def test_a_folder_is_no_output(home, output):
    with pytest.raises(IsADirectoryError, match=f"^output='{output}' is no file; name a .jsonl file"):
        check_output(output, lines=[COLUMNS], inputs={})


@pytest.mark.parametrize("scheme", ["", "memory://"])
@pytest.mark.parametrize("former", [None, "", FORMER], ids=["nothing", "an empty file", "a former output"])
def test_an_output_is_written_where_nothing_else_is(tmp_path, scheme, former):
    output = f"{scheme}{tmp_path}/scores.jsonl"
    if former is not None:
        with fsspec.open(output, "w") as file:
            file.write(former)
    check_output(output, lines=[COLUMNS], inputs={"data": [f"{scheme}{tmp_path}/rows.jsonl"]})
    write_output(output, [{"prompt": "é", "completion": "\ud83d"}, {"prompt": "a", "completion": "\u2028"}])
    with fsspec.open(output, "r", encoding="utf-8") as file:
        lines = file.read().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {"prompt": "é", "completion": "\ud83d"},
        {"prompt": "a", "completion": "\u2028"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ([] if scheme else ["scores.jsonl"])
    check_output(output, lines=[COLUMNS], inputs={})


@pytest.mark.parametrize(
    "text", ['{"prompt": "a"}\n', '{"a": 1, "prompt": 1, "completion": 1}', "[]", "5", "x", "[" * 10**5]
)
def test_other_lines_are_not_replaced(tmp_path, text):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(FileExistsError, match="exists and is not what this command writes"):
        check_output(str(tmp_path / "x.jsonl"), lines=[COLUMNS], inputs={})
    assert (tmp_path / "x.jsonl").read_text() == text


def test_a_former_output_stays_until_all_is_written(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(FORMER)

    def lines():
        yield {"prompt": "a", "completion": "b"}
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        write_output(str(path), lines())
    assert listing(tmp_path) == {"x.jsonl": FORMER.encode()}


def test_an_output_keeps_its_link_and_its_permissions(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x.jsonl").write_text(FORMER)
    (tmp_path / "there" / "x.jsonl").chmod(0o640)
    (tmp_path / "x.jsonl").symlink_to("there/x.jsonl")
    write_output(str(tmp_path / "x.jsonl"), [])
    assert (tmp_path / "x.jsonl").is_symlink()
    assert (tmp_path / "there" / "x.jsonl").read_text() == ""
    assert (tmp_path / "there" / "x.jsonl").stat().st_mode & 0o777 == 0o640


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output(str(pipe), lines=[COLUMNS], inputs={})
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_output(str(pipe), [{"prompt": "a", "completion": "b"}])
    assert os.read(reader, 1000) == b'{"prompt": "a", "completion": "b"}\n' and pipe.is_fifo()
    os.close(reader)
    for device in ("/dev/null", "/dev/stdout"):
        check_output(device, lines=[COLUMNS], inputs={})
