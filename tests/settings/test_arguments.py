"""The command line and the config file: what they mean together, and what a mistake in them says."""

import itertools
import random
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import draccus
import pytest
import yaml
from hostile_values import how_it_ends

from lora_dpo_jax.lora import LoraConfig
from lora_dpo_jax.main.evaluate import EvaluateConfig
from lora_dpo_jax.main.generate import GenerateConfig
from lora_dpo_jax.main.generate import parse as parse_generate
from lora_dpo_jax.main.plan import PlanConfig
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.help import help_text
from lora_dpo_jax.settings.launched import resuming_command
from lora_dpo_jax.settings.other_names import OTHER_NAMES
from lora_dpo_jax.settings.schema import NUMBER, comments_of, settings_of
from lora_dpo_jax.tracking import TensorboardConfig, WandbConfig

FILE = """
initialize_from_hf: base
data:
  components:
    old: {source: {type: url, train_urls: [old.jsonl], validation_urls: [held.jsonl]}, format: {slice_strategy: drop}}
  train_weights: {old: 1.0}
lora: {r: 4, alpha: 9.0}
loss: {type: sigmoid_norm, label_smoothing: 0.2}
trainer: {num_train_steps: 10, mesh: {param_mapping: {embed: model}, axes: {data: 2}}}
generation: {temperature: 0.5}
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def told(tmp_path):
    """The line for a file's text and words of the command line."""

    def told(text: str | bytes, *args: str, command: type = TrainConfig) -> str:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        line = how_it_ends(lambda: parse(command, ["--config_path", str(path), *args]))
        assert line is not None, "it was taken"
        return line.removeprefix("error: ").replace(str(path), path.name)

    return told


def with_file(file: Path, *args: str) -> TrainConfig:
    return parse(TrainConfig, ["--config_path", str(file), *args])


# What stands for what


def test_a_mapping_that_is_given_takes_the_place_of_the_files(file):
    new = "{new: {source: {train_urls: [new.jsonl]}}}"
    data = with_file(file, "--data.components", new, "--data.train_weights", "{new: 2.0}").data
    assert list(data.components) == ["new"] and data.train_weights == {"new": 2.0}
    mapping = with_file(file, "--trainer.mesh.param_mapping", "{mlp: data}").trainer.mesh.param_mapping
    assert mapping == {"mlp": "data"}
    assert with_file(file, "--trainer.mesh.axes", "{model: 2}").trainer.mesh.axes == {
        "replica": 1,
        "data": -1,
        "model": 2,
    }


def test_a_dotted_path_changes_or_adds_one_component(file):
    changed = with_file(file, "--data.components.old.source.train_urls", "[a.jsonl, b.jsonl]").data.components["old"]
    assert changed.source.train_urls == ["a.jsonl", "b.jsonl"] and changed.source.validation_urls == ["held.jsonl"]
    assert changed.format.slice_strategy == "drop"
    added = ["--data.components.new.source.train_urls=[c.jsonl]", "--data.train_weights.new", "3"]
    data = with_file(file, *added).data
    assert list(data.components) == ["old", "new"] and data.train_weights == {"old": 1.0, "new": 3.0}
    hub = ["--data.components.old.source.type", "hf", "--data.components.old.source.id", "some/rows"]
    assert "train_urls is a setting of type url" in str(how_it_ends(lambda: with_file(file, *hub)))
    source = with_file(file, "--data.components.old.source", "{type: hf, id: some/rows}").data.components["old"].source
    assert source.id == "some/rows"


def test_a_component_may_have_dots_in_its_name(tmp_path):
    path = tmp_path / "dots.yaml"
    path.write_text("{initialize_from_hf: x, data: {components: {a.v2: {source: {train_urls: [a]}}}}}")
    data = with_file(path, "--data.components.a.v2.source.train_urls", "[b]").data
    assert {name: part.source.train_urls for name, part in data.components.items()} == {"a.v2": ["b"]}


def test_a_mapping_for_a_section_changes_what_it_names(file):
    config = with_file(file, "--lora", "{r: 16}", "--loss", "{beta: 0.3}", "--generation", "{top_k: 5}")
    assert (config.lora.r, config.lora.alpha) == (16, 9.0)
    assert (type(config.loss).__name__, config.loss.beta, config.loss.label_smoothing) == (
        "LengthNormalizedDpo",
        0.3,
        0.2,
    )
    assert (config.generation.temperature, config.generation.top_k) == (0.5, 5)
    other = with_file(file, "--loss", "{type: sigmoid}").loss
    assert (type(other).__name__, other.label_smoothing) == ("Dpo", 0.0)
    assert type(with_file(file, "--loss", "sigmoid").loss).__name__ == "Dpo"


def test_a_section_that_is_given_in_part_keeps_its_other_defaults(file):
    assert with_file(file).generation.max_new_tokens == parse(TrainConfig, LEAST).generation.max_new_tokens == 64


def test_a_text_is_taken_as_it_stands(file):
    for text in ("010", "12:30", "1_000", "2026-08-01", "1.10", "a: b", "a #b", "[x]", "yes", "{{ x }}"):
        assert with_file(file, "--hf_revision", text).hf_revision == text
    assert with_file(file, "--hf_revision", "'010'").hf_revision == "010"
    assert with_file(file, "--hf_revision", "null").hf_revision is None
    file.write_text(FILE + "hf_revision: 1.10\n")
    assert with_file(file).hf_revision == "1.10"
    file.write_text(FILE + "hf_revision: 0123456\n")
    assert with_file(file).hf_revision == "0123456"
    assert with_file(file, "--lora.target_modules", "[qk]_proj.*").lora.target_modules == "[qk]_proj.*"
    assert with_file(file, "--lora.target_modules", "[q_proj, k_proj]").lora.target_modules == ["q_proj", "k_proj"]


def test_numbers_may_be_written_as_yaml_and_people_write_them(file):
    config = with_file(file, "--optimizer.learning_rate", "5e-6", "--trainer.num_train_steps", "1_000", "--preview=2")
    assert (config.optimizer.learning_rate, config.trainer.num_train_steps, config.preview) == (5e-6, 1000, 2)
    assert with_file(file, "--optimizer.warmup", "100").optimizer.warmup == 100
    assert with_file(file, "--optimizer.warmup", "0.1").optimizer.warmup == 0.1


def test_the_last_of_two_words_counts_and_one_file_is_read(file):
    assert with_file(file, "--lora.r", "8", "--lora.r", "2").lora.r == 2
    assert "--config_path stands 2 times" in str(how_it_ends(lambda: with_file(file, "--config_path", str(file))))


def test_the_command_line_may_say_in_its_way_what_the_file_says_in_another(file):
    trainer = with_file(file, "--trainer.num_train_epochs", "2").trainer
    assert (trainer.num_train_steps, trainer.num_train_epochs) == (None, 2.0)
    assert with_file(file, "--trainer", "{num_train_epochs: 2}").trainer == trainer
    file.write_text(FILE + "beta: 0.3\n")
    assert with_file(file, "--loss.beta", "0.2").preference_loss.beta == 0.2
    assert with_file(file, "--loss", "{beta: 0.2}").preference_loss.beta == 0.2
    assert with_file(file, "--loss", "{label_smoothing: 0.1}").preference_loss.beta == 0.3
    file.write_text(FILE.replace("label_smoothing: 0.2", "beta: 0.3"))
    assert with_file(file, "--beta", "0.2").preference_loss.beta == 0.2
    file.write_text(FILE.replace("label_smoothing: 0.2", "beta: 0.1") + "beta: 0.2\n")
    assert "beta=0.2 and loss.beta=0.1 disagree" in str(how_it_ends(lambda: with_file(file)))


def test_anchors_are_shared_but_a_change_is_not(tmp_path):
    path = tmp_path / "anchors.yaml"
    path.write_text(
        "initialize_from_hf: x\n"
        "data: {components: {a: &it {source: {train_urls: [a]}}, b: *it, "
        "c: {<<: *it, format: {slice_strategy: left}}}}\n"
    )
    components = with_file(path, "--data.components.a.source.train_urls", "[z]").data.components
    assert [part.source.train_urls for part in components.values()] == [["z"], ["a"], ["a"]]
    assert components["c"].format.slice_strategy == "left"


def test_the_settings_of_a_choice_follow_its_type(file):
    trackers = with_file(file, "--trainer.tracker", "[wandb, tensorboard]").trainer.tracker
    assert trackers == [WandbConfig(), TensorboardConfig()]
    assert with_file(file, "--trainer.tracker", "{type: wandb, tags: [a]}").trainer.tracker == [WandbConfig(tags=["a"])]
    assert with_file(file, "--trainer.tracker", "null").trainer.tracker == []
    line = how_it_ends(lambda: with_file(file, "--trainer.tracker.project", "p"))
    assert "--trainer.tracker.project is a part of a list; give the whole of it with --trainer.tracker" in str(line)


def test_prompts_are_taken_as_they_stand():
    texts = ["--help", "a: b", "é\x7f\u2028😀", "null", "[1"]
    args = [word for text in texts for word in ("--prompt", text)]
    config = parse_generate(
        ["--model", "base", *args, "--chat_template_kwargs", "{enable_thinking: false, depth: 1.5}"]
    )
    assert config.prompts == texts
    assert config.chat_template_kwargs == {"enable_thinking": False, "depth": 1.5}
    assert parse_generate(["--model", "m", "--prompt=--x", "--system", ""]).prompts == ["--x"]
    assert parse_generate(
        ["--model", "m", "--prompt", "x", "--chat_template_kwargs.depth", "2"]
    ).chat_template_kwargs == {"depth": 2}
    assert parse_generate(["--model", "m", "--prompt", "x", "--chat_template", "{{ messages }}"]).chat_template
    for args, says in (
        (["--prompt"], "--prompt needs a text"),
        (["--prompt", "a", "--prompts", "[b]"], "set the same"),
    ):
        assert says in str(how_it_ends(lambda args=args: parse_generate(["--model", "m", *args])))


def test_draccus_reads_a_commands_settings_as_the_command_does(file, monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("str | None is not callable")  # what argparse says to draccus in Python 3.14

    monkeypatch.setattr("argparse.ArgumentParser.add_argument", fail)
    args = ["--config_path", str(file), "--data.components.old.source.train_urls", "[b]"]
    assert draccus.parse(TrainConfig, args=args) == parse(TrainConfig, args)
    assert draccus.parse(config_class=TrainConfig, config_path=file, args=[]) == with_file(file)
    with pytest.raises(ValueError, match="lora.r is null"):
        draccus.decode(TrainConfig, yaml.safe_load(FILE) | {"lora": {"r": None}})


# What a mistake says


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "config_path='config.yaml' is empty"),
        ("# nothing\n", "is empty"),
        ("- 1\n", "holds a list"),
        ("5\n", "holds a number"),
        ("true\n", "holds true or false"),
        ("data: [", "config.yaml ends before the list that opens in line 1, column 7 is closed"),
        ("lora: {r: 4}\ndata: {a: [b],\n\n", "config.yaml ends before the mapping that opens in line 2, column 7 is"),
        (
            "lora: {r: 4\ntrainer:\n  seed: 1\n",
            "config.yaml, line 2, column 8 is no YAML: expected ',' or '}', but got ':'; the mapping that opens in "
            "line 1, column 7 is not closed",
        ),
        ("data: [a, {b: c}\nlora: {}\n", "; the list that opens in line 1, column 7 is not closed"),
        ("lora: {r: [1, 2}\n", "; the list that opens in line 1, column 11 is not closed"),
        ("id: 'x\nlora: {}\n", "config.yaml ends within the quotes that open in line 1, column 5"),
        ("lora: {}\nid\n\n", "config.yaml, line 2, column 1 is no YAML: could not find expected ':'"),
        ("lora: {r: 4}\nlora: {r: 5}\n", "config.yaml, line 2: lora stands twice, in line 1 too"),
        ("lora:\n  r: 4\n  r: 5\n", "config.yaml, line 3: lora.r stands twice, in line 2 too"),
        ("data: {components: {a: {}, a: {}}}", "data.components.a stands twice"),
        (
            "lora: !include other.yaml\n",
            "line 1, column 7: lora has a YAML tag, which is not taken; write all settings in one",
        ),
        ("lora: !!python/object/apply:os.system [ls]\n", "lora has a YAML tag, which is not taken"),
        ("lora: !!bool maybe\n", "has a value that is not what its tag says"),
        ("lora: !!int {r: 4}\n", "line 1, column 7 is no YAML: expected a scalar node, but found mapping"),
        ("lora: !!float [4]\n", "line 1, column 7 is no YAML: expected a scalar node, but found sequence"),
        ("lora.r: 4\n", "lora.r is no setting of a file. Write lora: {r: ...}"),
        (
            "trainer: {mesh.axes.data: 4}\n",
            "trainer.mesh.axes.data is no setting of a file. Write mesh: {axes: {data: ...}}",
        ),
        ("? [a]\n: b\n", "has a key that is no name"),
        ("lora: &a {r: *a}\n", "lora.r contains itself"),
        ("lora:\n\tr: 4\n", "is no YAML: a character that cannot stand there"),
        ("a: b\n---\nc: d\n", "is no YAML"),
        ("[" * 3000, "is nested too deeply"),
        (b"\xff\xfea\x00", "is no UTF-8 text"),
        (b"a: \x00", "a character that no text can hold"),
        ("a: b\n" * 300_000, "is larger than 1 MiB"),
        ("lora:\n", "lora is null; it must be a mapping of settings; leave it out to have the defaults"),
        ("lora: 5\n", "lora is a number; it must be a mapping of settings"),
        (
            "model: meta/llama\n",
            "model is a text; it must be a mapping of settings. The base model is initialize_from_hf",
        ),
        ("hf_revision: yes\n", "hf_revision=true must be a text; put it in quotes"),
        ("peft_save_path: ''\n", "peft_save_path='' says nothing"),
    ],
)
def test_a_file_that_is_no_config_is_told_by_its_place(told, text, says):
    line = told(text)
    assert says in line
    assert line.isprintable()


def test_a_bomb_of_aliases_is_told(told):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "has more than 100,000 values" in told("\n".join(levels))


def test_no_error_shows_what_is_in_a_file_that_is_no_config(told):
    """A path to a password file, by mistake or by design, says nothing of it."""
    secret = "hunter2"
    shapes = (
        *("{}", "- {}", "[{}", "{{{}", "*{}", "&{} x", "!{} x", "'{}", '"{}', "x: '{}", "a: *{}", "a: !{} b", "%{}"),
        *(
            "a: [{}, &{} b, &{} c]",
            "root:{}:0:0",
            "A={}\nB={}",
            "lora: {}",
            "- a\n- {}: x",
            "\t{}",
            "@{}",
            "`{}`",
            "|{}",
        ),
    )
    for shape in shapes:
        assert secret not in told(shape.format(secret, secret, secret)), shape
    rng = random.Random(0)
    for _ in range(300):
        noise = ["".join(rng.choices("{}[]:,&*#?|->!%@`'\" \n\t", k=rng.randint(0, 6))) for _ in range(3)]
        text = secret.join(noise)
        if not isinstance(_loaded(text), dict):  # keys of a mapping are taken for names of settings
            assert secret not in told(text), text


def _loaded(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError):
        return None


@pytest.mark.parametrize("path", ["gone.yaml", ".", "/dev/zero", "a\0b", "x" * 5000, "gs://bucket/run.yaml"])
def test_a_config_path_that_cannot_be_read_is_told(path):
    line = str(how_it_ends(lambda: parse(TrainConfig, ["--config_path", path])))
    assert line.startswith("error: config_path=") and line.isprintable()


def test_a_config_path_with_a_typo_is_told_the_name_that_is_there(tmp_path):
    (tmp_path / "run.yaml").touch()
    line = str(how_it_ends(lambda: parse(TrainConfig, ["--config_path", str(tmp_path / "rum.yaml")])))
    assert line.endswith(f"cannot be read: No such file or directory; did you mean {tmp_path / 'run.yaml'}?")


@pytest.mark.parametrize("pattern", ["q_proj", r".*\.(q|v)_proj", r".*layers\.[0-9]{1,2}\..*_proj", "model.layers.0.x"])
def test_a_regular_expression_is_no_list_of_names(pattern):
    assert LoraConfig(target_modules=pattern).target_modules == pattern


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_a_name_that_others_use_leads_to_the_setting(told, name):
    target, more = OTHER_NAMES[name]
    known = {setting.path for command in (TrainConfig, GenerateConfig) for setting in settings_of(command)}
    assert target in known | {"config_path"}
    for mentioned in re.findall(r"\b(?:trainer|model|optimizer|lora|data)\.[\w.]+\w", more):
        assert any(path == mentioned or path.startswith(mentioned) for path in known), mentioned
    if target == "max_new_tokens":
        text, command = "{model: m, prompts: [x]}", GenerateConfig
    else:
        text, command = FILE, TrainConfig
    for line in (told(text, f"--{name}", "5", command=command), told(f"{text}\n{name}: 5" if command is TrainConfig else
                 text[:-1] + f", {name}: 5}}", command=command)):  # fmt: skip
        assert f"{name} is no setting. Here it is {target}" in line
    assert f"{name} is no setting. Here it is {target}" in told(text, f"--{name}", command=command), "without a value"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trainer.num_train_step", "5"], "num_train_step is no setting. The nearest: trainer.num_train_steps"),
        (["--trainer.train-batch-size", "5"], "The nearest: trainer.train_batch_size"),
        (["--num_train_epochs", "5"], "--num_train_epochs is no setting. The nearest: trainer.num_train_epochs"),
        (["--optimzer.learning_rate", "5"], "is no setting. Here it is optimizer.learning_rate"),
        (["--trainr.log_every", "5"], "The nearest: trainer.log_every"),
        (["--data.components.old.source.train_url", "a"], "The nearest: data.components.old.source.train_urls"),
        (["--data.components.old.format.chosen", "a"], "The nearest: data.components.old.format.chosen_field"),
        (["--trainer.mesh.model_axis_size", "2"], "Here it is trainer.mesh.axes"),
        (["--config-path", "run.yaml"], "--config-path is no setting. Write --config_path"),
        (["--lora.r.", "5"], "--lora.r. is no setting"),
        (["--lora.", "5"], "--lora. is no setting"),
        (
            ["--data.components.old.source.type", "hf"],
            "data.components.old.source.train_urls is a setting of type url alone, and the type here is another",
        ),
        (["--lora.target_modules", "all-linear"], "PEFT reads this as every linear layer; here, leave it out"),
        (
            ["--lora.target_modules", "q_proj,v_proj"],
            "lora.target_modules='q_proj,v_proj': a text is a regular expression for whole paths; for a list of names "
            "write '[q_proj, v_proj]'",
        ),
        (["--lora.exclude_modules", "self_attn.q_proj, up_proj,"], "write '[self_attn.q_proj, up_proj]'"),
        (
            ["--lora.target_modules", "q_proj", "v_proj", "--lora.r", "4"],
            "'v_proj' is no setting. lora.target_modules takes a list: write --lora.target_modules '[q_proj, v_proj]'",
        ),
        (["--lora.target_modules=[q_proj,", "v_proj]"], "write --lora.target_modules '[q_proj, v_proj]'"),
        (
            ["--data.components.old.source.train_urls", "a.jsonl", "b.jsonl", "c.jsonl"],
            "write --data.components.old.source.train_urls '[a.jsonl, b.jsonl, c.jsonl]'",
        ),
        (["--lora.r", "4", "8"], "'8' is no setting. Settings are given as --SETTING VALUE"),
        (
            ["--output", "x"],
            "--output is no setting. Here it is peft_save_path (the adapter) or merged_hf_save_path (the merged "
            "model); output is one of evaluate and generate",
        ),
        (["--data.components.old.sorce", "{}"], "The nearest: data.components.old.source"),
        (
            ["--data.components.old.truncation_mode", "x"],
            "Here it is data.components.old.format.slice_strategy",
        ),
        (["--lora.target_modules", "[q_proj"], "lora.target_modules='[q_proj' is no regular expression"),
        (["--lora.exclude_modules", "*_proj"], "lora.exclude_modules='*_proj' is no regular expression"),
        (["--loss.type", "kpo"], "loss.type='kpo' must be one of sigmoid, sigmoid_norm"),
        (["--loss", "{type: sigmoid_nrm}"], "did you mean sigmoid_norm?"),
        (
            ["--trainer.tracker", "comet"],
            "trainer.tracker.0.type='comet' must be one of none, mlflow, tensorboard, trackio, wandb",
        ),
        (["--trainer.tracker", "[wandb, wandb]"], "trainer.tracker names wandb, wandb; each may be named once"),
        (["--data.components.old.source.type", "s3"], "data.components.old.source.type='s3' must be one of url, hf"),
        (["--data.components.old.format.type", "chat"], "data.components.old.format.type='chat' must be one of"),
        (["--sample_prompts", "[a, b"], "sample_prompts='[a, b' ends before the list that opens in line 1"),
        (["--sample_prompts", "a"], "sample_prompts='a' must be a list of texts"),
        (["--lora.r"], "--lora.r needs a value: a whole number"),
        (["--trainer.eval_at_start", "--lora.r", "4"], "--trainer.eval_at_start needs a value: true or false"),
        (["run.yaml"], "'run.yaml' is no setting. A config file is given with --config_path run.yaml"),
        (["lora.r=8"], "Write --lora.r=8"),
        (["-r", "8"], "'-r' is no setting. Settings are given as --SETTING VALUE"),
        (["--lora.r", ""], "--lora.r needs a value; the one given is empty"),
        (["--beta", "-1"], "beta=-1.0 must be positive"),
        (["--beta", ".nan"], "beta=nan must be a finite number"),
        (["--lora.alpha", "0"], "lora.alpha=0.0 must be a positive number"),
        (["--lora.dropout", "0.99999999999"], "lora.dropout=0.99999999999 must be in [0, 1), in float32 too"),
        (["--optimizer.epsilon", "1e-60"], "optimizer.epsilon=1e-60 is so small that it is 0 in float32"),
        (["--preview", "-1"], "preview=-1 must be"),
        (["--trainer.seed", "-1"], "trainer.seed=-1 must be in [0, 2**32)"),
        (["--trainer.seed", "4294967296"], "trainer.seed=4294967296 must be in [0, 2**32)"),
        (["--trainer.num_train_epochs", "1e300"], "trainer.num_train_epochs=1e300 must be a finite number"),
        (["--trainer.num_train_epochs", "1e10"], "trainer.num_train_epochs=10000000000.0 makes more steps than"),
        (["--hf_save_steps", "5"], "hf_save_steps=5 exports nothing: set peft_save_path"),
        (["--trainer.mp", "f64"], "trainer.mp='f64': JAX computes in float32 instead"),
        (["--model.dtype", "f64"], "model.dtype='f64': JAX computes in float32 instead"),
        (["--model.dtype", "p=f32,c=bf16"], "model.dtype='p=f32,c=bf16' must be one dtype"),
        (["--trainer.mp", "half"], "half is float16 or bfloat16; name one of them"),
        (["--trainer.id", "../x"], "trainer.id='../x' must be the name of one folder in trainer.log_dir"),
        (["--trainer.id", "/x"], "trainer.id='/x' must be the name of one folder"),
        (["--trainer.id", "a/b"], "trainer.id='a/b' must be the name of one folder"),
        (["--trainer.id", ".."], "trainer.id='..' must be the name of one folder"),
        (["--trainer.id", "a\x1b[2J"], r"trainer.id='a\x1b[2J' must be the name of one folder"),
        (["--trainer.id", "é" * 150], "has 300 bytes; it must have at most 200"),
        (["--trainer.log_dir", "gs://bucket/logs"], "trainer.log_dir='gs://bucket/logs' must be a folder of this"),
        (["--peft_save_path", "~nobody-here/x"], "peft_save_path='~nobody-here/x': ~nobody-here is no user"),
        (["--peft_save_path", "x" * 300], "is too long for a path"),
        (["--generation.top_p", "2"], "generation.top_p=2.0 must be in (0, 1]"),
        (["--trainer.mesh.param_mapping.embed", "[data, 5]"], "trainer.mesh.param_mapping"),
        (["--train_seq_len", "99999999999999999999"], "is beyond what 64 bits hold"),
        (["--train_seq_len", "1e3"], "train_seq_len=1e3 must be a whole number"),
        (["--data.components", "{}"], "data.components is empty"),
        (["--data.components", "null"], "data.components is null; it must be a mapping from names to mappings"),
        (["--data.components.olt.format.strings", "chat"], "data.components has old: was one meant?"),
        (["--adapter", "{type: lora}"], "Here it is lora.r and others of lora for new adapters, or"),
        (["--data.train_weights", "{old: null}"], "data.train_weights.old is null; it must be a number"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_told_by_its_setting(told, args, says):
    assert says in told(FILE, *args)


def test_what_must_be_given_points_to_a_file_and_the_quickstart():
    for args in ([], ["--initialize_from_hf", "x"], ["--data", "{}", "--initialize_from_hf", "x"]):
        line = str(how_it_ends(lambda args=args: parse(TrainConfig, args)))
        assert "data.components" in line and "missing" in line
        assert "--config_path config/quickstart.yaml" in line
    assert "model is missing" in str(how_it_ends(lambda: parse_generate(["--prompt", "x"])))
    assert "output is missing" in str(how_it_ends(lambda: parse(EvaluateConfig, ["--config_path", QUICKSTART])))


QUICKSTART = str(Path(__file__).parents[2] / "config" / "quickstart.yaml")


def test_null_holds_out_nothing(file):
    assert with_file(file, "--validation_split_fraction", "null").held_out_fraction == 0.0


# What --help says


@pytest.mark.parametrize("command", [TrainConfig, EvaluateConfig, PlanConfig, GenerateConfig])
def test_help_shows_each_setting_once_with_its_own_comment_and_default(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["main"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lora_dpo_jax.main"])
    text = help_text(command)
    shown = re.findall(r"^  (?:--)?(\S+) \S.*  \((.*)\)$", text, flags=re.MULTILINE)
    assert [path for path, _ in shown] == [setting.path for setting in settings_of(command)]
    assert len(set(shown)) == len(shown)
    for setting in settings_of(command):
        assert setting.comment, f"{setting.path} has no comment"
    if command is TrainConfig:
        paragraph = re.search(r"  --lora.dropout NUMBER  \(default 0.0\)\n(        .*\n)", text)
        assert paragraph and "on the input of the adapters" in paragraph[1]
        assert "--generation.max_new_tokens INT  (default 64)" in text
        assert "--initialize_from_hf TEXT  (must be given)" in text
        assert "--loss.type sigmoid|sigmoid_norm" in text
    assert max(map(len, text.splitlines())) < 130


def test_a_setting_of_a_class_without_source_has_no_comment():
    names: dict = {}
    exec("import dataclasses\n@dataclasses.dataclass\nclass Own:\n    margin: float = 1.0  # of a notebook", names)
    names["Own"].__module__ = "notebook"
    assert comments_of(names["Own"]) == {}


def test_help_ends_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(TrainConfig, ["--lora.r", "nonsense", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


def test_every_default_that_help_shows_can_be_given(file, monkeypatch):
    """What is shown is what the setting takes."""
    monkeypatch.setenv("COLUMNS", "100")
    config = with_file(file)
    shown = re.findall(
        r"^  --(\S+) \S.*  \(default (.*?)(?:; of type (\w+).*)?\)$", help_text(TrainConfig), flags=re.MULTILINE
    )
    for path, default, first_type in shown:
        if not {NUMBER, "NAME"} & set(path.split(".")) and path != "loss.losses":  # a mix of none is none
            section = path.partition(".")[0]
            is_of_type = first_type and section in ("loss", "optimizer")
            given = [*LEAST, *([f"--{section}.type={first_type}"] if is_of_type else [])]
            given += ["--loss.losses=[sigmoid]"] if first_type == "mix" else []
            assert parse(TrainConfig, [*given, f"--{path}={default}"]) == parse(TrainConfig, given), path
    least = parse(TrainConfig, LEAST)
    assert len(shown) > 80 and config != least


LEAST = ["--initialize_from_hf", "x", "--data.components.a.source.train_urls", "[a]"]


# Beside python -m


def test_each_console_script_is_a_commands_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    modules = {
        "lora-dpo": "__main__",
        "lora-dpo-check": "check",
        "lora-dpo-combine": "combine",
        "lora-dpo-evaluate": "evaluate",
        "lora-dpo-generate": "generate",
        "lora-dpo-judge": "judge",
        "lora-dpo-pairs": "pairs",
        "lora-dpo-plan": "plan",
        "lora-dpo-report": "report",
    }
    assert project["scripts"] == {name: f"lora_dpo_jax.main.{module}:run" for name, module in modules.items()}
    for entry in project["scripts"].values():
        module, _, function = entry.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize(
    ("started", "argv0", "command"),
    [
        (["python", "-m", "lora_dpo_jax.main"], "/src/main/__main__.py", "python -m lora_dpo_jax.main"),
        (["/env/bin/python", "-X", "dev", "-m", "lora_dpo_jax.main"], "/src/__main__.py",
         "/env/bin/python -X dev -m lora_dpo_jax.main"),
        (["/env/bin/python", "/env/bin/sh"], "/env/bin/sh", "sh"),  # a script on the path, as lora-dpo is
    ],
)  # fmt: skip
def test_a_run_is_resumed_by_the_command_that_it_was_started_by(monkeypatch, started, argv0, command):
    settings = ["--config_path", "my run.yaml", "--sample_prompts", "[it's]"]
    monkeypatch.setattr(sys, "argv", [argv0, *settings])
    monkeypatch.setattr(sys, "orig_argv", [*started, *settings])
    quoted = "--config_path 'my run.yaml' --sample_prompts '[it'\"'\"'s]'"
    assert resuming_command(["--trainer.id", "x"]) == f"{command} {quoted} --trainer.id x"


def test_every_shape_of_a_wrong_tree_is_told(told):
    """A value of each kind in the place of each section."""
    sections = {
        setting.section for setting in settings_of(TrainConfig) if setting.section and "N" not in setting.section
    }
    for section, value in itertools.product(
        sorted(sections), ([], [1], "x", 5, True, None, {"": 1}, {5: 1}, {None: 1})
    ):
        tree: Any = value
        for name in reversed(section.replace("NAME", "old").split(".")):
            tree = {name: tree}
        line = told(yaml.safe_dump(tree | {"initialize_from_hf": "x"} | ({} if "data" in tree else {"data": DATA})))
        assert section.replace("NAME", "old").split(".")[0] in line, (section, value, line)


DATA = {"components": {"old": {"source": {"train_urls": ["a"]}}}}
