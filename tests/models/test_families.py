"""Every family of models is what transformers, PEFT and its own files say, whatever it is asked for.

One tiny model a family, and two programs: generation, and a forward pass whose tokens and mask are arguments.
"""

import functools
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from haliax import Axis
from safetensors.numpy import load_file
from tiny_models import (
    FAMILIES,
    LENGTH,
    VOCAB,
    WRAPPERS,
    in_the_words_of_transformers_4,
    load,
    random_tokens,
    summed_log_probs,
    tiny_folder,
    torch_logits,
    with_random_adapters,
)

from lora_dpo_jax.data.batches import packed_rows
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.table import whole_table
from lora_dpo_jax.generation import GenerationConfig, generate
from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
from lora_dpo_jax.huggingface.weights import read_config, save_merged
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.lora import LoraConfig, trainable_filter
from lora_dpo_jax.models import CausalLM, PackedMask, config_from_hf
from lora_dpo_jax.models.architectures import ARCHITECTURES
from lora_dpo_jax.sharding import MeshConfig, Placement

families = pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
# PEFT 0.21 takes gate_proj, where a model has experts, for the experts' alone: adapters of its dense layers get lost.
IN_PEFT = [family for family in (*FAMILIES, *WRAPPERS) if family != "qwen3_moe_dense"]
# PEFT gives the experts' fused matrices a rank of their own, which it then looks for among modules alone.
OF_EXPERTS = "The following (rank|alpha)_pattern keys did not match any targeted module"
RENAMED = "`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{RENAMED}:FutureWarning")

LORA = LoraConfig(r=4, alpha=4.0)
TOKENS = random_tokens(2, LENGTH)
AXES = Axis("row", 2), Axis("position", LENGTH)


def model_class(family: str) -> Any:
    return transformers.AutoModelForImageTextToText if family in WRAPPERS else transformers.AutoModelForCausalLM


@functools.cache
def theirs(family: str) -> Any:
    return model_class(family).from_pretrained(tiny_folder(family), dtype="float32").eval()


@functools.cache
def unadapted(family: str) -> CausalLM:
    return load(tiny_folder(family))


@functools.cache
def adapted(family: str) -> CausalLM:
    """With adapters on every linear layer but the head."""
    return with_random_adapters(unadapted(family), LORA)


def plain(family: str) -> CausalLM:
    """Of the same structure, so that it is not compiled again; its adapters add nothing."""
    model = adapted(family)
    adapters, weights = eqx.partition(model, trainable_filter(model))
    return eqx.combine(jax.tree.map(jnp.zeros_like, adapters), weights)


@eqx.filter_jit
def forward(model: CausalLM, tokens: np.ndarray, mask: PackedMask) -> jax.Array:
    return model(hax.named(tokens, AXES), mask.position_ids, mask).array


def logits(model: CausalLM) -> np.ndarray:
    return np.asarray(forward(model, TOKENS, PackedMask.causal(*AXES)))


@families
def test_logits_match_transformers(family):
    np.testing.assert_allclose(logits(plain(family)), torch_logits(theirs(family), TOKENS), rtol=0, atol=1e-4)


def test_sinks_reach_the_kernels_of_packed_rows_on_a_mesh():
    """Which splits heads, and so sinks."""
    placement = Placement(MeshConfig(axes={"data": 2, "model": 2}), jax.devices()[:4])
    model = load(tiny_folder("gpt_oss"), attention="auto")
    with placement.scope():
        ours = logits(placement.put_parameters(model))
    np.testing.assert_allclose(ours, torch_logits(theirs("gpt_oss"), TOKENS), rtol=0, atol=1e-4)


# Rows of (prompt, first response, second response), by their lengths. The prompt is shared in the first row, and comes
# twice in the second, where one sequence is longer than the original lengths of FAMILIES and the other is not.
SHARED, APART = (6, 8, 10), (3, 4, 14)


@families
def test_packed_responses_match_transformers_one_sequence_at_a_time(family):
    ids = np.zeros((2, 2, LENGTH), np.int32)
    prompt, first, second = SHARED
    ids[:, 0] = [
        np.repeat([0, 1, 2], SHARED),
        [*range(prompt + first), *range(prompt, prompt + second)],
    ]
    sequences = [(0, [*range(prompt + first)]), (0, [*range(prompt), *range(prompt + first, LENGTH)])]
    prompt, first, second = APART
    ids[:, 1] = [
        np.repeat([1, 2], [prompt + first, prompt + second]),
        [*range(prompt + first), *range(prompt + second)],
    ]
    sequences += [(1, [*range(prompt + first)]), (1, [*range(prompt + first, LENGTH)])]
    branch, position = (hax.named(x, AXES) for x in ids)
    packed = np.asarray(forward(plain(family), TOKENS, PackedMask(hax.ones(AXES, jnp.int32), branch, position)))
    for row, at in sequences:
        expected = torch_logits(theirs(family), TOKENS[row : row + 1, at])
        np.testing.assert_allclose(packed[row, at], expected[0], rtol=0, atol=1e-4)


def test_each_response_is_scored_by_its_own_length_whatever_shares_its_row():
    """longrope chooses its factors by the length of a sequence, not of a row: 16 tokens are the last short one."""
    family, (prompt, lengths) = "phi3_longrope", (9, [(7, 8), (3, 9), (2, 7), (10, 12)])
    rng = np.random.default_rng(0)
    pairs = [
        TokenizedExample.pair(*(rng.integers(0, VOCAB, n, dtype=np.int32) for n in (prompt, *of_pair)))
        for of_pair in lengths
    ]
    table = whole_table({"pairs": MemoryExamples(pairs)}).switching_at(unadapted(family).config.switch_length)
    assert [pair.shares_prompt for pair in table] == [False, False, True, True]
    _, batches = packed_rows(table, rows=1, place=lambda batch: jax.tree.map(jnp.asarray, batch))
    score = eqx.filter_jit(score_responses)
    found = {}
    for batch in batches:
        scores = score(unadapted(family), batch.micro_batch(0)).log_probs.array.reshape(-1)
        of_responses = batch.examples.ids.array.reshape(-1)[batch.examples.example_of_response.array.reshape(-1)]
        for example, value in zip(of_responses.tolist(), scores.tolist(), strict=True):
            found.setdefault(example, []).append(value)
    for number, pair in enumerate(pairs):
        expected = [
            summed_log_probs(theirs(family), pair.prompt.tolist(), response.tolist()) for response in pair.responses
        ]
        np.testing.assert_allclose(found[number], expected, rtol=0, atol=1e-3)  # sums over up to 12 tokens


@pytest.mark.parametrize("family", IN_PEFT)
def test_our_adapter_in_peft_and_merged_gives_our_logits(family, tmp_path, caplog):
    source, ours = tiny_folder(family), logits(adapted(family))
    assert np.abs(ours - logits(plain(family))).max() > 0.05
    save_adapter(adapted(family), tmp_path / "adapter", base_model=str(source), config=LORA)
    save_merged(adapted(family), source, tmp_path / "merged")
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=RENAMED)
        warnings.filterwarnings("ignore", message=OF_EXPERTS)
        base = model_class(family).from_pretrained(source, dtype="float32").eval()
        in_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        merged, info = model_class(family).from_pretrained(
            tmp_path / "merged", output_loading_info=True, dtype="float32"
        )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")) and not caplog.records
    np.testing.assert_allclose(ours, torch_logits(in_peft, TOKENS), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours, torch_logits(merged.eval(), TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["phi3", "mixtral", "gemma3"])
def test_an_adapter_of_fused_matrices_experts_or_a_wrapper_is_read_as_it_was_written(family, tmp_path):
    save_adapter(adapted(family), tmp_path / "adapter", base_model=str(tiny_folder(family)), config=LORA)
    found = load_adapter(unadapted(family), tmp_path / "adapter")
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(adapted(family)), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@families
def test_greedy_completions_are_those_of_transformers(family):
    prompts, count = [TOKENS[0, :5].tolist(), TOKENS[1, :9].tolist()], 32
    ours = generate(unadapted(family), prompts, GenerationConfig(max_new_tokens=count), stop_ids=[])
    for prompt, completion in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        settings = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, temperature=None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = theirs(family).generate(ids, attention_mask=torch.ones_like(ids), **settings)
        assert completion == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_dialects_of_config_json_and_its_defaults_say_the_same(family, tmp_path):
    older = in_the_words_of_transformers_4(tiny_folder(family), tmp_path / "model")
    expected = read_config(tiny_folder(family))
    assert read_config(older) == expected
    short = json.loads(json.dumps(FAMILIES[family].to_diff_dict()))
    assert config_from_hf(short) == expected


def test_what_a_file_says_of_its_code_must_be_what_the_code_computes():
    """Keys of the hub's files that no code of transformers reads."""
    given = json.loads(FAMILIES["cohere2"].to_json_string(use_diff=False))
    constants = ARCHITECTURES["cohere2"].constants
    assert config_from_hf(given | constants) == config_from_hf(given)
    with pytest.raises(ValueError, match="config.json: .*rotary_pct.*0.5"):
        config_from_hf(given | {"rotary_pct": 0.5})


def written_by_transformers_4(family: str, folder: Path) -> Path:
    """A model of text and images whose file leaves out what its text model has by default, as those on the hub do."""
    shutil.copytree(tiny_folder(family), folder)
    config = json.loads((folder / "config.json").read_text())
    text = FAMILIES[config["text_config"]["model_type"]]
    config["text_config"] = json.loads(json.dumps(text.to_diff_dict()))
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_wrapper_that_says_little_is_the_same_model(family, tmp_path):
    """Gemma's head is tied, and Mistral's is not, because its files hold one."""
    folder = written_by_transformers_4(family, tmp_path / "model")
    assert read_config(folder) == read_config(tiny_folder(family))
    assert read_config(folder).tie_word_embeddings is (family == "gemma3")


@pytest.mark.parametrize("family", WRAPPERS)
def test_the_tensors_of_images_are_copied_and_their_layers_have_no_adapters(family, tmp_path):
    save_merged(adapted(family), tiny_folder(family), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder(family), tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed and all(name.startswith("language_model.model.layers.") for name in changed)
    save_adapter(adapted(family), tmp_path / "adapter", base_model="base", config=LORA)
    targets = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert "model.language_model.layers.1.self_attn.q_proj" in targets


def test_settings_of_images_are_no_settings_of_text():
    given = json.loads(WRAPPERS["gemma3"].to_json_string(use_diff=False))
    assert config_from_hf(given | {"mm_tokens_per_image": 9}) == config_from_hf(given)
    with pytest.raises(ValueError, match="config.json: text_config: .*clip_qkv"):
        config_from_hf(given | {"text_config": given["text_config"] | {"clip_qkv": 8.0}})
    with pytest.raises(ValueError, match="config.json: .*logit_scale"):
        config_from_hf(given | {"logit_scale": 2.0})
