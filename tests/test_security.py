"""What comes from others, a model's folder or rows, is not run and does not reach a terminal as it is."""

import io
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import transformers
from tiny_models import load, tiny_folder
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.data import cache
from lora_dpo_jax.data.config import ComponentConfig
from lora_dpo_jax.data.preview import preview
from lora_dpo_jax.data.sources import UrlSource
from lora_dpo_jax.huggingface.adapters import save_adapter
from lora_dpo_jax.huggingface.folders import local_folder
from lora_dpo_jax.huggingface.tokenizers import read_tokenizer
from lora_dpo_jax.huggingface.weights import save_merged
from lora_dpo_jax.lora import LoraConfig, loraize
from lora_dpo_jax.main import generate
from lora_dpo_jax.main.errors import print_trace, told_in_a_line
from lora_dpo_jax.printable import printable
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.runs.base import load_tokenizer
from lora_dpo_jax.runs.held_out import HeldOutScores
from lora_dpo_jax.runs.report import Samples, print_report

ESCAPES = "\x1b]0;title\x07\x1b[2J\r\x9b31m\u202e"
CODE = "import pathlib\npathlib.Path(__file__).with_name('it_ran').touch()\nclass Mine:\n    pass\n"


@pytest.fixture
def with_code(tmp_path, monkeypatch) -> Path:
    """A model whose files ask for Python code beside them."""
    folder = tmp_path / "with_code"
    shutil.copytree(tiny_folder("llama3.1"), folder)
    (folder / "mine.py").write_text(CODE)
    for name, kind in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        settings = json.loads((folder / name).read_text())
        settings["auto_map"] = {kind: ["mine.Mine", "mine.Mine"] if kind == "AutoTokenizer" else "mine.Mine"}
        (folder / name).write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it was asked whether to run the code"))
    return folder


def test_code_of_a_model_is_not_run_and_its_tokenizer_is_that_of_transformers(with_code, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(4))
    tokenizer = load_tokenizer(run_config(tmp_path, rows, initialize_from_hf=str(with_code)))
    assert type(tokenizer).__module__.startswith("transformers.")
    assert tokenizer("a b")["input_ids"] == read_tokenizer(tiny_folder("llama3.1"))("a b")["input_ids"]
    assert not list(with_code.rglob("it_ran"))


def test_a_tokenizer_that_is_nothing_but_code_is_refused_by_its_file(with_code):
    (with_code / "config.json").unlink()
    settings = json.loads((with_code / "tokenizer_config.json").read_text())
    (with_code / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Mine"}))
    with pytest.raises(ValueError, match=r"tokenizer_config.json asks for Python code .* never run"):
        read_tokenizer(with_code)
    with pytest.raises(ValueError, match="never run.*set tokenizer"):
        generate.main(generate.GenerateConfig(model=str(with_code), prompts=["x"]))
    assert not list(with_code.rglob("it_ran"))


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_exports_bring_no_code_and_ask_for_none(with_code, tmp_path, own_tokenizer):
    config = LoraConfig(r=2)
    model = loraize(load(with_code), config, key=jax.random.key(0))
    tokenizer = read_tokenizer(with_code)
    save_adapter(model, tmp_path / "adapter", base_model=str(with_code), config=config, tokenizer=tokenizer)
    save_merged(model, with_code, tmp_path / "merged", tokenizer=tokenizer if own_tokenizer else None)
    for name in ("adapter", "merged"):
        exported = [path for path in (tmp_path / name).rglob("*") if path.suffix in (".json", ".py")]
        assert not [path.name for path in exported if path.suffix == ".py" or '"auto_map"' in path.read_text()]
    # To trust the export's code is then harmless too.
    transformers.AutoConfig.from_pretrained(tmp_path / "merged", trust_remote_code=True)


def test_code_of_a_repository_is_not_fetched(with_code, monkeypatch):
    asked = []
    monkeypatch.setattr("lora_dpo_jax.huggingface.folders.snapshot_download", lambda name, **o: asked.append(o) or "x")
    local_folder("org/name")
    patterns = asked[0]["allow_patterns"]
    assert not [pattern for pattern in patterns if Path("mine.py").match(pattern) or Path("model.bin").match(pattern)]


@pytest.fixture
def pairs(tmp_path, make_rows):
    """(tokenized pairs, tokenizer): rows with escapes, in a file whose name holds some."""
    tokenizer = read_tokenizer(instruct_folder())
    component = ComponentConfig(UrlSource([str(make_rows(tmp_path / f"{ESCAPES.replace('/', '')}.jsonl"))]))
    options = dict(split="train", train_seq_len=128, cache_dir=tmp_path / "cache", name=ESCAPES)
    return cache.tokenize_component(component, tokenizer, **options), tokenizer


@pytest.fixture
def make_rows():
    row = {"prompt": f"p{ESCAPES}", "chosen": f"yes {ESCAPES}", "rejected": f"no {ESCAPES}"}
    return lambda path: write_rows(path, [row] * 2)


def has_no_escapes(shown: str) -> bool:
    return shown == "".join(c for c in shown if c.isprintable() or c in "\n\t")


def test_a_preview_shows_escapes_and_sends_none(pairs):
    file = io.StringIO()
    preview(*pairs, 2, file, color=False)
    assert "yes \\x1b]0;title\\x07" in file.getvalue() and has_no_escapes(file.getvalue())


def test_a_progress_bar_sends_no_escapes(tmp_path, make_rows, monkeypatch):
    described = []
    monkeypatch.setattr(cache, "tqdm", lambda rows, **options: described.append(options["desc"]) or rows)
    component = ComponentConfig(UrlSource([str(make_rows(tmp_path / "rows.jsonl"))]))
    cache.tokenize_component(
        component, read_tokenizer(instruct_folder()), split="train", train_seq_len=128, cache_dir=tmp_path, name=ESCAPES
    )
    assert described and all(map(has_no_escapes, described))


def test_a_completion_sends_no_escapes_and_is_written_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "complete", lambda *_, **__: [f"{ESCAPES}two\n\tlines"])
    args = ["--model", str(instruct_folder()), "--prompt", f"x{ESCAPES}", "--output", str(tmp_path / "out.jsonl")]
    generate.main(generate.parse(args))
    shown = capsys.readouterr().out
    assert has_no_escapes(shown) and "x\\x1b]0;title" in shown and "two\n\tlines" in shown
    written = json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))
    assert written == {"prompt": f"x{ESCAPES}", "completion": f"{ESCAPES}two\n\tlines"}


def test_a_report_sends_no_escapes(tmp_path, capsys):
    samples = Samples([ESCAPES], None, None, stop_ids=())  # type: ignore[arg-type]
    samples.completions = [[ESCAPES]] * 2
    scores = HeldOutScores(None, None, None, None, [])  # type: ignore[arg-type]
    print_report(samples, scores, {"adapter": f"out{ESCAPES}", "metrics": tmp_path / ESCAPES})
    assert has_no_escapes(capsys.readouterr().out)


def test_an_error_and_its_trace_send_no_escapes_and_no_secrets(capsys):
    name = f"./gone{ESCAPES}?token=abcdefgh"
    with pytest.raises(SystemExit), told_in_a_line():
        local_folder(name)
    shown = capsys.readouterr().err
    assert shown.startswith("error: ./gone\\x1b]0;title\\x07") and has_no_escapes(shown) and "abcdefgh" not in shown
    try:
        local_folder(name)
    except FileNotFoundError as error:
        print_trace(type(error), error, error.__traceback__)
    shown = capsys.readouterr().err
    assert "Traceback" in shown and has_no_escapes(shown) and "abcdefgh" not in shown


@pytest.mark.parametrize("library", ["transformers", "huggingface_hub", "datasets", None])
def test_a_log_sends_no_escapes_and_no_secrets_whoever_writes_it(library, monkeypatch):
    stderr, logger = io.StringIO(), logging.getLogger(library or "lora_dpo_jax")
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(logging.root, "handlers", [])
    if library:  # which writes past the root's handlers
        monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(stderr)])
        monkeypatch.setattr(logger, "propagate", False)
    log_to_stderr(logging.INFO)
    logger.warning("read %s", f"{ESCAPES}\udcff ?token=abcdefgh")
    assert stderr.getvalue() == f"warning: read {printable(ESCAPES)}\\udcff ?token=***\n"


def test_what_a_terminal_cannot_show_ends_no_command(monkeypatch):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    with told_in_a_line():
        print("Grüße", flush=True)
    assert terminal.getvalue() == b"Gr\\xfc\\xdfe\n"


def test_a_command_whose_reader_has_gone_ends_without_a_word():
    command = [sys.executable, "-m", "lora_dpo_jax.main", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(120)) == (b"", 141)
