"""`python -m lora_dpo_jax.main.evaluate` against transformers' own forward pass, pair by pair."""

import dataclasses
import json

import draccus
import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import summed_log_probs
from tiny_runs import instruct_folder, plain_rows, preference_rows, run_config, write_rows

from lora_dpo_jax.main.evaluate import LINES, EvaluateConfig, main
from lora_dpo_jax.main.output_file import check_output
from lora_dpo_jax.settings.arguments import parse

# PEFT asks transformers for what transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.usefixtures("two_devices"),
]

ROWS = {"chat": preference_rows(9), "plain": plain_rows(9)}


@pytest.fixture(scope="module")
def base():
    return transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, model): an adapter made by PEFT, with a product that is not zero."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(str(folder))
    return folder, model


def evaluate_config(tmp_path, rows, **settings) -> EvaluateConfig:
    config = run_config(tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return EvaluateConfig(**fields | {"output": str(tmp_path / "scores.jsonl"), "split": "train"} | settings)


def read_scores(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]


def tokens_of(row: dict) -> tuple[list[int], list[int], list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
    if isinstance(row["prompt"], str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        wholes = [tokenizer(row["prompt"] + row[key] + "</s>")["input_ids"] for key in ("chosen", "rejected")]
    else:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        wholes = [
            tokenizer.apply_chat_template(row["prompt"] + row[key], return_dict=False) for key in ("chosen", "rejected")
        ]
    return prompt, *(whole[len(prompt) :] for whole in wholes)


@pytest.mark.parametrize("kind", ROWS)
def test_scores_match_transformers_pair_by_pair(tmp_path, base, policy, kind, capsys):
    rows = ROWS[kind]
    summary = main(evaluate_config(tmp_path, rows, adapter=str(policy[0]), beta=0.2))
    scores = read_scores(tmp_path)
    assert [score["index"] for score in scores] == list(range(len(rows)))
    margins, longer, likelier = [], [], []
    for score, row, number in zip(scores, rows, range(1, len(rows) + 1), strict=True):
        prompt, chosen, rejected = tokens_of(row)
        assert score["origin"].endswith(f"rows.jsonl, row {number}")
        assert score["prompt_tokens"] == len(prompt)
        assert (score["chosen_tokens"], score["rejected_tokens"]) == (len(chosen), len(rejected))
        expected = {
            f"{prefix}logp_{name}": summed_log_probs(model, prompt, response)
            for prefix, model in (("", policy[1]), ("ref_", base))
            for name, response in (("chosen", chosen), ("rejected", rejected))
        }
        # Sums of about -100 nats, in float32.
        assert {name: score[name] for name in expected} == pytest.approx(expected, rel=1e-5)
        ratios = [expected[f"logp_{name}"] - expected[f"ref_logp_{name}"] for name in ("chosen", "rejected")]
        margins.append(0.2 * (ratios[0] - ratios[1]))
        longer.append(np.sign(len(chosen) - len(rejected)))
        likelier.append(np.sign(expected["ref_logp_chosen"] - expected["ref_logp_rejected"]))
    assert summary["rewards/margins"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert summary["loss"] == pytest.approx(np.logaddexp(0, -np.array(margins)).mean(), abs=1e-4)
    correct, longer, likelier = np.array(margins) > 0, np.array(longer), np.array(likelier)
    assert summary["dpo_accuracy"] == np.mean(correct)
    # The usual standard error of a mean, and the two baselines.
    error = np.std(correct, ddof=1) / np.sqrt(len(rows))
    assert summary["dpo_accuracy_se"] == pytest.approx(error)
    assert summary["rewards/margins_se"] == pytest.approx(np.std(margins, ddof=1) / np.sqrt(len(rows)), abs=1e-5)
    assert summary["longer_response/accuracy"] == np.mean((1 + longer) / 2)
    assert summary["reference_log_prob/accuracy"] == np.mean((1 + likelier) / 2)
    assert len({*longer}) > 1
    for name, sign in (("chosen_longer", 1), ("chosen_shorter", -1), ("same_length", 0)):
        of_group = longer == sign
        assert summary.get(f"{name}/pairs", 0) == of_group.sum()
        if of_group.any():
            assert summary[f"{name}/dpo_accuracy"] == np.mean(correct[of_group])
            assert summary[f"{name}/reference_log_prob/accuracy"] == np.mean((1 + likelier[of_group]) / 2)
    printed = capsys.readouterr().out
    assert f"{np.mean(correct):.1%} ± {error:.1%}" in printed
    lines = {line[:22].strip(): line[22:].split() for line in printed.splitlines()}
    assert lines["longer response"][0] == f"{np.mean((1 + longer) / 2):.1%}"
    assert lines["log-prob of the base"][0] == f"{np.mean((1 + likelier) / 2):.1%}"


def test_a_policy_that_is_the_reference_ties_every_pair(tmp_path, policy, capsys):
    config = evaluate_config(tmp_path, ROWS["chat"], initialize_from_peft=str(policy[0]))
    summary = main(config)
    assert (summary["dpo_accuracy"], summary["dpo_accuracy_se"], summary["rewards/margins_se"]) == (0.5, 0.0, 0.0)
    assert summary["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert "log-prob of initialize_from_peft " in capsys.readouterr().out
    assert all(score["logp_chosen"] == score["ref_logp_chosen"] for score in read_scores(tmp_path))
    check_output(config.output, lines=LINES, inputs={})  # the same command may be given again


def test_an_adapter_that_adds_nothing_ties_every_pair(tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "new")
    summary = main(evaluate_config(tmp_path, ROWS["plain"], adapter=str(tmp_path / "new")))
    assert (summary["dpo_accuracy"], summary["rewards/margins"]) == (0.5, 0.0)


def test_a_split_without_pairs_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"the validation split has no pairs \(validation_split_fraction is 0\.0, and"):
        main(evaluate_config(tmp_path, ROWS["chat"], split="validation"))


def test_the_command_line_gives_the_config_of_a_run_and_what_to_score(tmp_path):
    run = run_config(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS["chat"]))
    (tmp_path / "config.yaml").write_text(draccus.dump(run))
    args = ["--output", "out.jsonl", "--split", "train"]
    config = parse(EvaluateConfig, args, config_path=tmp_path / "config.yaml")
    assert (config.output, config.split, config.adapter, config.data) == ("out.jsonl", "train", None, run.data)
