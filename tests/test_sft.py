"""Instruction tuning: rows of single responses, the loss `sft` of them, and DPO of the adapter that it makes."""

import dataclasses
import json
import logging
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from chat_templates import CHATML
from safetensors.numpy import load_file
from tiny_pairs import VOCAB, moved, new_adapters
from tiny_runs import TRL_RUN, instruct_folder, preference_rows, read_metrics, run_config, training_metrics, write_rows

from lora_dpo_jax.data.batches import packed_batches
from lora_dpo_jax.data.config import FormatConfig
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.rows import read_example
from lora_dpo_jax.data.shapes import choose_shapes
from lora_dpo_jax.data.sources import RowError
from lora_dpo_jax.data.table import whole_table
from lora_dpo_jax.evaluation import Scorer, summarize
from lora_dpo_jax.losses import LOSSES, Dpo, Sft
from lora_dpo_jax.main import evaluate
from lora_dpo_jax.main.train import main
from lora_dpo_jax.preference_objective import PreferenceObjective
from lora_dpo_jax.runs.assembly import load_tables
from lora_dpo_jax.runs.base import load_tokenizer
from lora_dpo_jax.runs.checks import refuse_unfit_data
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.training.step import accumulate

pytestmark = pytest.mark.usefixtures("two_devices")

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 3, 4


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TURNS = [user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")]
SHARE_GPT = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in TURNS]
# A row, settings of its format, its prompt and its response.
ROWS = {
    "messages": ({"messages": TURNS}, {}, TURNS[:1], TURNS[1:]),
    "messages as text": ({"messages": json.dumps(TURNS)}, {}, TURNS[:1], TURNS[1:]),
    "ShareGPT": ({"conversations": SHARE_GPT}, {}, TURNS[:1], TURNS[1:]),
    "a system message": (
        {"messages": TURNS[:2], "system": "Be brief."},
        {},
        [{"role": "system", "content": "Be brief."}, TURNS[0]],
        TURNS[1:2],
    ),
    "prompt and completion": ({"prompt": TURNS[:3], "completion": TURNS[3:]}, {}, TURNS[:3], TURNS[3:]),
    "messages as the prompt": ({"messages": TURNS[:3], "completion": "See you"}, {}, TURNS[:3], TURNS[3:]),
    "strings": ({"prompt": "Hi", "completion": " you"}, {}, "Hi", " you"),
    "strings as turns": ({"prompt": "Hi", "completion": "Hello"}, {"strings": "chat"}, TURNS[:1], TURNS[1:2]),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": " you"}, {"completion_field": "output"}, "Hi", " you"),
    "the chosen one": ({"chosen": TURNS, "rejected": TURNS[:2]}, {"completion_field": "chosen"}, TURNS[:1], TURNS[1:]),
}


@pytest.mark.parametrize("shape", ROWS)
def test_a_supervised_row_is_a_prompt_and_one_response(shape):
    row, settings, prompt, response = ROWS[shape]
    example = read_example(row, FormatConfig(type="supervised", **settings), "row 1")
    assert (example.prompt, example.responses, example.comparisons) == (prompt, (response,), ())


def test_the_turns_of_the_assistant_are_scored_unless_set_otherwise():
    assert FormatConfig(type="supervised").scored_turns == "all_turns"
    assert FormatConfig(type="supervised", train_on="response").scored_turns == "response"


@pytest.mark.parametrize(
    "row, error",
    [
        ({"messages": [user("Hi")]}, "has a conversation without a message of the assistant"),
        ({"messages": [assistant("Hi")]}, "has no prompt"),
        ({"prompt": "Hi"}, "has no 'completion'; its columns are"),
        ({"completion": "Hi"}, "has no prompt: set format.prompt_field"),
        ({"messages": []}, "'messages' is an empty list"),
    ],
)
def test_a_supervised_row_that_lacks_something_is_named(row, error):
    with pytest.raises(RowError, match=f"train.jsonl, row 3: {error}"):
        read_example(row, FormatConfig(type="supervised"), "train.jsonl, row 3")


def examples_of(kinds: str) -> list[TokenizedExample]:
    """`s` is an example of one response, `p` a pair."""
    rng = np.random.default_rng(0)

    def tokens(longest: int) -> np.ndarray:
        return rng.integers(0, VOCAB, rng.integers(2, longest)).astype(np.int32)

    singles = {
        "s": lambda: TokenizedExample(tokens(9), (tokens(12),)),
        "p": lambda: TokenizedExample.pair(tokens(9), tokens(9), tokens(9)),
    }
    return [singles[kind]() for kind in kinds]


@pytest.mark.parametrize("kinds", ["sss", "sps"])
def test_the_loss_is_the_mean_over_all_tokens_to_imitate(kinds):
    table = whole_table({"memory": MemoryExamples(examples_of(kinds))})
    model = moved(new_adapters())
    scores = Scorer(table, rows=2)(model)
    log_probs, tokens = np.asarray(scores.log_probs.array), np.asarray(scores.tokens.array)
    starts = table.arrays.response_starts[:-1]  # the only response, or the chosen one
    expected = -log_probs[starts].sum() / tokens[starts].sum()
    found = summarize(Sft(), scores, None, table.arrays.examples)
    assert found["loss"] == pytest.approx(expected, rel=1e-5) == found["nll_loss"]
    assert ("dpo_accuracy" in found) == ("p" in kinds)

    ids = [np.arange(len(table))]
    losses, gradients = [], []
    for longest_row in (None, 32):  # one micro-batch, and several
        shapes = choose_shapes(ids, table.sizes, longest_row=longest_row)
        (batch,) = packed_batches(table, ids, shapes, place=lambda batch: jax.tree.map(jnp.asarray, batch))
        objective = PreferenceObjective(Sft())
        step = jax.jit(lambda model, batch, objective=objective: accumulate(objective, model, None, batch, key=None))
        done = step(model, batch)
        losses += [float(done.loss), float(done.metrics["nll_loss"].value)]
        gradients.append(jax.tree.leaves(done.gradients))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_loss_of_pairs_refuses_single_responses():
    table = whole_table({"chat": MemoryExamples(examples_of("ss"))})
    with pytest.raises(ValueError, match="data.components.chat has single ones .format.type=unpaired or supervised"):
        refuse_unfit_data(Dpo(), table)
    refuse_unfit_data(Sft(), table)
    refuse_unfit_data(Sft(), whole_table({"chat": MemoryExamples(examples_of("pp"))}))
    assert not Sft().needs_reference and LOSSES["sft"] is Sft


def test_labels_and_weights_of_single_answers_are_for_all_components_or_for_none():
    columns = {"label": [1.0], "example_weight": 1.0}
    plain, labelled = examples_of("ss")
    labelled = dataclasses.replace(labelled, columns=columns)
    tables = {"plain": MemoryExamples([plain]), "thumbs": MemoryExamples([labelled])}
    with pytest.raises(ValueError, match="data.components.plain has no label and no example_weight, and other"):
        refuse_unfit_data(Sft(), whole_table(tables))
    refuse_unfit_data(Sft(), whole_table({"thumbs": tables["thumbs"]}))
    weighted = FormatConfig(type="supervised", weight_field="trust")
    row = {"prompt": "Hi", "completion": " you", "trust": 0.5}
    assert read_example(row, weighted, "row 1").columns == {"example_weight": 0.5}
    assert read_example(row, FormatConfig(type="supervised"), "row 1").columns == {}


# The template with marks around what the model writes, which TRL's `assistant_only_loss` needs and ours does not.
MARKED = CHATML.replace(
    "{{ message.content }}<|im_end|>\n",
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>\n{% endif %}",
)
CONVERSATIONS = [{"messages": [*row["prompt"], *row["chosen"]]} for row in preference_rows(STEPS * BATCH)]
COMPLETIONS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in preference_rows(STEPS * BATCH)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with an adapter by PEFT whose product is not zero."""
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("start")
    peft.get_peft_model(base, config).save_pretrained(str(folder))
    return folder


def trl_trainer(folder: Path, start: Path, rows: list[dict], **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        import datasets
        from trl import SFTConfig, SFTTrainer

        datasets.disable_progress_bars()
        logging.getLogger("trl").setLevel(logging.ERROR)
        tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
        tokenizer.chat_template = MARKED
        base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32)
        return SFTTrainer(
            peft.PeftModel.from_pretrained(base, start, is_trainable=True),
            args=SFTConfig(
                str(folder / "trl"),
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                max_grad_norm=1.0,
                **TRL_RUN,
                **settings,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def our_config(tmp_path: Path, start: Path, rows: list[dict], **settings) -> TrainConfig:
    return run_config(
        tmp_path,
        write_rows(tmp_path / "train.jsonl", rows),
        initialize_from_peft=str(start),
        data__components__prefs__format={"type": "supervised"},
        loss={"type": "sft"},
        trainer__num_train_steps=STEPS,
        trainer__train_batch_size=BATCH,
        trainer__token_metrics=True,
        peft_save_path=str(tmp_path / "adapter"),
        optimizer={"learning_rate": 1e-3, "lr_schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0},
        **settings,
    )


def labels_of(trainer) -> list[tuple[list[int], list[int]]]:
    """(ids, ids that are scored, -100 elsewhere) of each row."""
    batches = (trainer.data_collator([row]) for row in trainer.train_dataset)
    return [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]


def our_labels(table) -> list[tuple[list[int], list[int]]]:
    found = []
    for example in table:
        (response,) = example.responses
        scored = np.ones(len(response), bool) if example.scored is None else example.scored[0]
        labels = [-100] * len(example.prompt) + np.where(scored, response, -100).tolist()
        found.append(([*example.prompt.tolist(), *response.tolist()], labels))
    return found


def test_three_steps_on_conversations_are_those_of_trl(tmp_path, start):
    trainer = trl_trainer(tmp_path, start, CONVERSATIONS, assistant_only_loss=True)
    initial = load_file(start / "adapter_model.safetensors")
    expected_labels = labels_of(trainer)
    trainer.train()
    theirs = {
        name: tensor.detach().numpy()
        for name, tensor in peft.get_peft_model_state_dict(trainer.model, adapter_name="default").items()
    }
    config = our_config(tmp_path, start, CONVERSATIONS)
    main(config)
    ours, lines = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), training_metrics(config)
    expected = [line for line in trainer.state.log_history if "loss" in line]
    tolerances = {"loss": 1e-4, "grad_norm": 1e-3, "entropy": 1e-4, "mean_token_accuracy": 1e-6}
    for name, tolerance in tolerances.items():
        found = [line[f"train/{name}"] for line in lines]
        np.testing.assert_allclose(found, [line[name] for line in expected], atol=tolerance, err_msg=name)
    moved_by = apart = 0.0
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        distance = np.linalg.norm(ours[name] - tensor)
        assert distance < 5e-3 * np.linalg.norm(tensor), name
        moved_by, apart = moved_by + np.linalg.norm(tensor - initial[name]) ** 2, apart + distance**2
    assert apart**0.5 < 5e-3 * moved_by**0.5
    table, _ = load_tables(config, load_tokenizer(config))
    assert our_labels(table) == expected_labels
    assert any(example.scored is not None for example in table)  # some have several turns


def test_completions_are_scored_as_by_trl(tmp_path, start):
    expected = labels_of(trl_trainer(tmp_path, start, COMPLETIONS, completion_only_loss=True))
    config = our_config(tmp_path, start, COMPLETIONS)
    table, _ = load_tables(config, load_tokenizer(config))
    assert our_labels(table) == expected


def test_single_responses_are_evaluated_without_a_reference(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[:4])
    words = ["--initialize_from_hf", str(instruct_folder()), "--data.cache_dir", str(tmp_path / "cache")]
    words += ["--data.components", f"{{c: {{source: {{train_urls: ['{rows}']}}, format: {{type: supervised}}}}}}"]
    words += ["--loss.type", "sft", "--model.attention", "dense", "--trainer.log_dir", str(tmp_path)]
    words += ["--split", "train", "--validation_split_fraction", "0", "--output", str(tmp_path / "scores.jsonl")]
    summary = evaluate.main(parse(evaluate.EvaluateConfig, words))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    keys = ("index", "origin", "logp", "completion_tokens", "prompt_tokens")
    assert keys in evaluate.LINES and [tuple(line) for line in lines] == [keys] * 4
    logps, tokens = (sum(line[name] for line in lines) for name in ("logp", "completion_tokens"))
    assert summary["loss"] == pytest.approx(-logps / tokens, rel=1e-5)
    assert "4 examples of the train split" in capsys.readouterr().out
    assert not (tmp_path / "cache" / "reference").exists()


def test_the_shipped_configs_tune_an_adapter_and_then_hold_dpo_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found, adapters = {}, {}
    for name, start in (("quickstart_sft", None), ("quickstart_sft_then_dpo", "quickstart_sft")):
        words = ["--config_path", f"config/{name}.yaml", "--trainer.num_train_steps", "3", "--sample_prompts", "[]"]
        words += [
            "--trainer.log_dir",
            str(tmp_path / "logs"),
            "--trainer.id",
            name,
            "--data.cache_dir",
            str(tmp_path / "cache"),
        ]
        words += ["--peft_save_path", str(tmp_path / name), "--trainer.log_every", "1", "--trainer.steps_per_eval", "3"]
        # What is compiled soonest, without the exports that are no subject here.
        words += ["--model.attention", "dense", "--lora.target_modules", "[q_proj, down_proj]"]
        words += ["--trainer.token_metrics", "true"]
        if start:
            words += ["--initialize_from_peft", str(tmp_path / start), "--merged_hf_save_path", "null"]
            words += ["--trainer.eval_at_start", "false"]
        config = parse(TrainConfig, words)
        main(config)
        found[name], adapters[name] = read_metrics(config), load_file(tmp_path / name / "adapter_model.safetensors")
    tuned, aligned = found.values()
    first, last = (line["eval/loss"] for line in tuned if "eval/loss" in line)
    assert last < first
    assert not {key for line in tuned for key in line} & {
        "eval/dpo_accuracy",
        "train/dpo_accuracy",
        "train/pairs_per_second",
    }
    assert "train/examples_per_second" in {key for line in tuned for key in line}
    of_pairs = {"logps/chosen_per_token", "logps/rejected_per_token"}
    for lines, more in ((tuned, set()), (aligned, of_pairs)):
        for split in ("train", "eval"):
            logged = {key.removeprefix(f"{split}/") for line in lines for key in line if key.startswith(f"{split}/")}
            of_tokens = {key for key in logged if key in ("entropy", "mean_token_accuracy") or "per_token" in key}
            assert of_tokens == {"entropy", "mean_token_accuracy", *more}
    # Policy and reference are the tuned adapter.
    losses = [line["train/loss"] for line in aligned if "train/loss" in line]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4) and losses[-1] < losses[0]
    one, other = adapters.values()
    assert one.keys() == other.keys()
    assert all(
        0 < np.linalg.norm(one[name] - other[name]) < np.linalg.norm(one[name]) for name in one if "lora_A" in name
    )
