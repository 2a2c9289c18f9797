"""Which servers would load an adapter and act on it: one case for each rule."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_dpo_jax.huggingface.servers import LLAMA, MERGED, PEFT, RULES, SERVERS, SGLANG, VLLM, AdapterFiles, verdicts
from lora_dpo_jax.main.check import CheckConfig, main, report, run

WRAPPED = {"text_config": {"num_hidden_layers": 2}}
NOTHING, REFUSED, OTHERWISE = "loads and does nothing", "does not load", "acts differently"


def write(folder: Path, *, before: str = "base_model.model.model.", after: str = ".weight", rank: int = 4, base=None,
          tensors=None, zero: bool = False, head: bool = False, modules=("self_attn.o_proj",), added=None, without=None,
          **settings) -> AdapterFiles:  # fmt: skip
    """A small adapter, changed in one way, and the config.json of its base."""
    rng = np.random.default_rng(0)
    found = {}
    layers = [f"{before}layers.{number}.{module}" for number in range(2) for module in modules]
    for layer in [*layers, *(["base_model.model.lm_head"] if head else [])]:
        found[f"{layer}.lora_A{after}"] = rng.normal(size=(rank, 8)).astype(np.float32)
        found[f"{layer}.lora_B{after}"] = rng.normal(size=(8, rank)).astype(np.float32) * (not zero)
    folder.mkdir(exist_ok=True)
    save_file(found | (tensors or {}), folder / "adapter_model.safetensors")
    targets = [module.rpartition(".")[2] for module in modules] + (["lm_head"] if head else [])
    config = dict(peft_type="LORA", r=rank, lora_alpha=8, target_modules=targets) | settings
    config.pop(without, None)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "base").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text(json.dumps({"vocab_size": 8} | (base or {"num_hidden_layers": 2})))
    return AdapterFiles.read(folder, folder / "base")


def attention(*sides: str) -> list[str]:
    return [f"self_attn.{side}_proj" for side in sides]


def outcomes(files: AdapterFiles) -> dict[str, str]:
    return {verdict.server: verdict.outcome for verdict in verdicts(files) if verdict.outcome != "acts"}


ONE = np.ones((8, 8), np.float32)
DELTA = {"base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector": np.ones(8, np.float32)}
EMBEDDING = {"base_model.model.model.embed_tokens.weight": ONE}
TOKEN_ROWS = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": ONE}
BASE_LAYER = {"base_model.model.model.embed_tokens.base_layer.weight": ONE}
LARGER = {"base_model.model.model.embed_tokens.weight": np.ones((9, 8), np.float32)}
BIAS = {"base_model.model.model.layers.0.self_attn.o_proj.lora_B.bias": np.ones(8, np.float32)}
EVERY = dict.fromkeys(SERVERS, NOTHING)
EXPERTS = "base_model.model.model.layers.0.mlp.experts"
PARAMETERS = {
    f"{EXPERTS}{module}.lora_{side}.weight": np.ones(shape, np.float32)
    for module in (".base_layer", "")
    for side, shape in (("A", (600, 8)), ("B", (8, 600)))
}
OF_EXPERTS = dict(tensors=PARAMETERS, target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
CASES = {
    "plain": ({}, {}),
    "patterns that change nothing": (dict(rank_pattern={"k_proj": 2}, alpha_pattern={"v_proj": 3}), {}),
    "zero": (dict(zero=True), EVERY),
    "text names on a multimodal base": (dict(base=WRAPPED), {PEFT: NOTHING, VLLM: NOTHING}),
    "names of the multimodal base": (dict(base=WRAPPED, before="base_model.model.model.language_model."), {}),
    "multimodal names on a text base": (
        dict(before="base_model.model.model.language_model."), {PEFT: NOTHING, VLLM: NOTHING},
    ),
    "a bare AutoModel": (dict(before="base_model.model."), {PEFT: NOTHING, VLLM: NOTHING}),
    "no prefix": (dict(before="model."), {PEFT: NOTHING}),
    "the name of the adapter": (dict(after=".default.weight"), {VLLM: REFUSED, LLAMA: REFUSED}),
    "another name of the adapter": (dict(after=".policy.weight"), {PEFT: NOTHING, VLLM: REFUSED, LLAMA: REFUSED}),
    "targets elsewhere": (dict(target_modules=["k_proj"]), {PEFT: NOTHING, SGLANG: REFUSED}),
    "a regular expression elsewhere": (dict(target_modules=".*k_proj"), {PEFT: NOTHING, SGLANG: REFUSED}),
    "a regular expression": (dict(target_modules=".*o_proj"), {SGLANG: REFUSED}),
    "no targets": (dict(without="target_modules"), {VLLM: REFUSED, SGLANG: REFUSED}),
    "null targets": (dict(target_modules=None), {SGLANG: REFUSED}),
    "all-linear": (dict(target_modules="all-linear"), {}),
    "some targets elsewhere": (dict(target_modules=["layers.0.self_attn.o_proj"]), {PEFT: OTHERWISE}),
    "rslora": (dict(use_rslora=True), {SGLANG: OTHERWISE, LLAMA: OTHERWISE}),
    "another alpha": (dict(alpha_pattern={"o_proj": 16}), {SGLANG: OTHERWISE, LLAMA: OTHERWISE}),
    "another rank": (dict(r=2, rank_pattern={"o_proj": 4}), {SGLANG: REFUSED}),
    "q, k and v": (dict(modules=attention("q", "k", "v")), {}),
    "q and v": (dict(modules=attention("q", "v")), {}),
    "q alone": (dict(modules=attention("q", "o")), {SGLANG: REFUSED}),
    "q and k": (dict(modules=attention("q", "k")), {SGLANG: REFUSED}),
    "v alone": (dict(modules=attention("v")), {SGLANG: REFUSED}),
    "gate alone": (dict(modules=["mlp.gate_proj"]), {}),
    "up alone": (dict(modules=["mlp.up_proj", "mlp.down_proj"]), {SGLANG: REFUSED}),
    "gate and up": (dict(modules=["mlp.gate_proj", "mlp.up_proj"]), {}),
    "dora": (dict(use_dora=True, tensors=DELTA), {VLLM: REFUSED, SGLANG: REFUSED, LLAMA: REFUSED}),
    "added tokens": (dict(added={"<new>": 8}), {SGLANG: REFUSED}),
    "tokens of the base": (dict(added={"<old>": 7}), {}),
    "rows of tokens": (
        dict(trainable_token_indices=[1], tensors=TOKEN_ROWS), {VLLM: REFUSED, SGLANG: OTHERWISE, LLAMA: REFUSED},
    ),
    "lora_bias": (
        dict(lora_bias=True, tensors=BIAS), {VLLM: REFUSED, SGLANG: OTHERWISE, LLAMA: REFUSED, MERGED: REFUSED},
    ),
    "bias": (dict(bias="all"), {VLLM: REFUSED, MERGED: REFUSED}),
    "null bias": (dict(bias=None), {VLLM: REFUSED}),
    "alora": (dict(alora_invocation_tokens=[1]), {VLLM: REFUSED, SGLANG: OTHERWISE, MERGED: REFUSED}),
    "layers repeated": (dict(layer_replication=[[0, 1]]), {VLLM: REFUSED, SGLANG: OTHERWISE, MERGED: REFUSED}),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), {VLLM: REFUSED, SGLANG: OTHERWISE}),
    "a classifier": (dict(modules_to_save=["score"]), {SGLANG: OTHERWISE}),
    "an embedding": (dict(tensors=EMBEDDING), {VLLM: REFUSED, LLAMA: REFUSED}),
    "an embedding of a target": (dict(tensors=BASE_LAYER), {}),
    "a larger embedding": (dict(tensors=LARGER), {VLLM: REFUSED, SGLANG: OTHERWISE, LLAMA: REFUSED}),
    "gaussian": (dict(init_lora_weights="gaussian"), {}),
    "another start": (dict(init_lora_weights="pissa_niter_4"), {
        VLLM: REFUSED, SGLANG: OTHERWISE, LLAMA: OTHERWISE, MERGED: REFUSED,
    }),
    "pissa": (dict(init_lora_weights="pissa"), {VLLM: REFUSED, SGLANG: OTHERWISE, LLAMA: OTHERWISE}),
    "loftq": (
        dict(init_lora_weights="loftq"), {VLLM: REFUSED, SGLANG: OTHERWISE, LLAMA: OTHERWISE, MERGED: REFUSED},
    ),
    "parameters of gpt-oss": (dict(OF_EXPERTS, base={"model_type": "gpt_oss"}), {SGLANG: REFUSED, LLAMA: REFUSED}),
    "parameters of Mixtral": (
        dict(OF_EXPERTS, base={"model_type": "mixtral"}), {VLLM: OTHERWISE, SGLANG: REFUSED, LLAMA: REFUSED},
    ),
    "a rank above all": (dict(rank=513), {VLLM: REFUSED}),
    "a rank above all of no layer": (dict(rank_pattern={"k_proj": 513}), {VLLM: REFUSED}),
    "no lora_alpha": (dict(lora_alpha=None), dict.fromkeys(SERVERS, REFUSED)),
    "a tied head": (dict(head=True, base={"tie_word_embeddings": True}), {LLAMA: REFUSED, MERGED: REFUSED}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_server_does_what_its_rules_say(case, tmp_path):
    changes, expected = CASES[case]
    found = outcomes(write(tmp_path / "adapter", **changes))
    assert found == {server: outcome for server, outcome in expected.items() if outcome != "acts"}


def test_every_rule_has_a_case(tmp_path):
    """Each rule finds something in a case, and nothing in the plain one."""
    plain = write(tmp_path / "plain")
    cases = [write(tmp_path / str(n), **changes) for n, (changes, _) in enumerate(CASES.values())]
    for rule in RULES:
        assert rule.finds(plain) is None, rule
        assert any(rule.finds(files) for files in cases), rule
        assert rule.source and rule.server


def test_the_command_exits_with_1_where_an_adapter_would_do_nothing(tmp_path, capsys, monkeypatch):
    def exit_status(**changes) -> int:
        write(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "adapter" / "base"), **changes)
        monkeypatch.setattr("sys.argv", ["check", "--adapter", str(tmp_path / "adapter")])
        try:
            run()
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    assert exit_status() == 0
    assert exit_status(use_dora=True, tensors=DELTA) == 0  # some do not load it, which they say
    capsys.readouterr()
    assert exit_status(base=WRAPPED) == 1
    said = capsys.readouterr().out
    assert "vLLM 0.33                loads and does nothing" in said
    assert (
        "layers are named model.layers.0.self_attn.o_proj, and the class that is served has model.language_model."
        in said
    )


def test_a_high_rank_needs_a_flag_of_vllm(tmp_path):
    files = write(tmp_path / "adapter", rank=32)
    assert "--max-lora-rank 32" in report("it", files, main(CheckConfig(adapter=str(tmp_path / "adapter"))))


def test_the_rank_and_the_scaling_of_a_parameter_are_those_of_its_own_name(tmp_path):
    """gate_up_proj is the inner wrapper, whatever the order in the settings."""
    files = write(tmp_path / "adapter", **OF_EXPERTS, rank_pattern={"gate_up_proj": 2}, alpha_pattern={"down_proj": 2})
    inner, outer = (f"model.layers.0.mlp.experts{module}" for module in (".base_layer", ""))
    assert files.parameters == {inner: f"{outer}.gate_up_proj", outer: f"{outer}.down_proj"}
    assert (files.ranks[inner], files.ranks[outer]) == (2, 4)
    assert (files.scalings[inner], files.scalings[outer]) == (4.0, 0.5)
