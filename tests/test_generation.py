"""Completions against transformers' own `generate`, live, on tiny random models."""

import collections
import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from tiny_models import VOCAB, random_tokens, tiny_folder, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from lora_dpo_jax import decoding
from lora_dpo_jax.generation import GenerationConfig, complete, encode_prompt, generate, read_stop_ids
from lora_dpo_jax.huggingface.tokenizers import save_tokenizer
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.lora import LoraConfig, loraize, merge_lora, trainable_filter
from lora_dpo_jax.main import generate as command
from lora_dpo_jax.models import decoder
from lora_dpo_jax.runs import systems
from lora_dpo_jax.runs.report import Samples
from lora_dpo_jax.sampling import choose, filter_logits, first_highest
from lora_dpo_jax.sharding import MeshConfig, Placement

# PEFT asks transformers for what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Prompts and completions run past the sliding windows and past the length at which `dynamic` begins to stretch.
FAMILIES = ["smollm2", "llama3.1", "llama_dynamic_rope", "mistral", "qwen2_window", "qwen3"]
GREEDY = GenerationConfig(max_new_tokens=24)
SAMPLED = GenerationConfig(max_new_tokens=24, temperature=0.8, top_k=40, top_p=0.9, seed=3)
# 64 is a whole prompt block, 65 begins the next one.
PROMPTS = [random_tokens(length, seed=length).tolist() for length in (3, 64, 17, 1, 65)]
FOLDER = tiny_folder("smollm2")
TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def llama():
    return our_model("smollm2")


def our_model(architecture: str, dtype=jnp.float32):
    folder = tiny_folder(architecture)
    return load_model(folder, read_config(folder), dtype=dtype)


def their_completion(theirs, prompt: list[int], new_tokens: int = GREEDY.max_new_tokens) -> list[int]:
    """Without a stop token, so to the full length."""
    theirs.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    return theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def until(completion: list[int], stops) -> list[int]:
    return completion[: next((i for i, token in enumerate(completion) if token in stops), len(completion))]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_greedy_completions_match_transformers_one_by_one(architecture):
    # A new model for each: theirs, with `dynamic` scaling, remembers the longest sequence it has seen.
    expected = [their_completion(tiny_model(architecture), prompt) for prompt in PROMPTS]
    assert len(set(itertools.chain(*expected))) > 10  # else matching would say little
    assert generate(our_model(architecture), PROMPTS, GREEDY, stop_ids=[]) == expected


def test_a_sample_depends_on_no_other_prompt(llama):
    together = generate(llama, PROMPTS, SAMPLED, stop_ids=[])
    # With two rows, those that end are given to the prompts that wait.
    assert generate(llama, PROMPTS, dataclasses.replace(SAMPLED, batch_size=2), stop_ids=[]) == together
    others = generate(llama, [PROMPTS[0], [7] * 100, *PROMPTS[2:]], SAMPLED, stop_ids=[])
    assert others[1] != together[1]
    assert others[:1] + others[2:] == together[:1] + together[2:]


def test_completions_end_before_the_first_stop_token(llama):
    whole = generate(llama, PROMPTS, GREEDY, stop_ids=[])
    stops = {whole[0][5], whole[2][0]}
    cut = [until(row, stops) for row in whole]
    assert cut[2] == [] and len({len(row) for row in cut}) > 1
    assert generate(llama, PROMPTS, GREEDY, stop_ids=stops) == cut
    assert generate(llama, PROMPTS, dataclasses.replace(GREEDY, batch_size=2), stop_ids=stops) == cut


def test_the_seed_alone_decides_a_sample(llama):
    first, again = (generate(llama, PROMPTS[:2], SAMPLED, stop_ids=[]) for _ in range(2))
    other = generate(llama, PROMPTS[:2], dataclasses.replace(SAMPLED, seed=4), stop_ids=[])
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_equal_prompts_are_sampled_apart(llama):
    completions = generate(llama, [PROMPTS[0]] * 4, SAMPLED, stop_ids=[])
    assert len({tuple(completion) for completion in completions}) == 4


def test_a_sample_depends_on_its_stream_and_not_on_its_place(llama):
    together = generate(llama, PROMPTS[:3], SAMPLED, stop_ids=[])
    elsewhere = generate(llama, [PROMPTS[2], PROMPTS[0], PROMPTS[2]], SAMPLED, stop_ids=[], streams=[2, 0, 2**32 - 1])
    assert elsewhere[:2] == [together[2], together[0]]
    assert elsewhere[2] != together[2]


def test_one_candidate_is_greedy(llama):
    greedy = generate(llama, PROMPTS[:2], GREEDY, stop_ids=[])
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        config = GenerationConfig(max_new_tokens=24, temperature=1.0, **narrow)
        assert generate(llama, PROMPTS[:2], config, stop_ids=[]) == greedy


@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
def test_filtered_logits_match_transformers(top_k, top_p):
    logits = np.random.default_rng(1).normal(scale=2.0, size=(6, 97)).astype(np.float32)
    expected = torch.tensor(logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    config = GenerationConfig(temperature=1.0, top_k=top_k, top_p=top_p)
    np.testing.assert_array_equal(filter_logits(jnp.array(logits), config), expected.numpy())


def test_top_k_keeps_ties_as_transformers_does():
    logits = np.array([[1.0, 2.0, 2.0, 0.0, 3.0]], dtype=np.float32)
    ours = filter_logits(jnp.array(logits), GenerationConfig(temperature=1.0, top_k=2))
    np.testing.assert_array_equal(ours, TopKLogitsWarper(2)(None, torch.tensor(logits)).numpy())  # type: ignore[arg-type]


def test_sampled_frequencies_are_the_softmax_at_that_temperature():
    logits, draws = jnp.array([0.0, 1.0, 2.0, -1.0]), 20_000
    config = GenerationConfig(temperature=2.0)
    chosen = choose(jnp.tile(logits, (draws, 1)), jax.random.split(jax.random.key(0), draws), config)
    frequencies = np.bincount(chosen, minlength=4) / draws
    # Four standard deviations of a frequency of 1/2 over 20,000 draws.
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits / 2.0), atol=4 * 0.5 / draws**0.5)


def test_an_adapted_model_completes_as_its_merge_does(llama):
    adapted = loraize(llama, LoraConfig(r=4, alpha=8.0, dropout=0.5), key=jax.random.key(0))
    assert generate(adapted, PROMPTS, GREEDY, stop_ids=[]) == generate(llama, PROMPTS, GREEDY, stop_ids=[])
    adapted = jax.tree.map(lambda x, trains: x + 0.05 if trains else x, adapted, trainable_filter(adapted))
    completions = generate(adapted, PROMPTS, GREEDY, stop_ids=[])
    assert completions == generate(merge_lora(adapted), PROMPTS, GREEDY, stop_ids=[])
    assert completions != generate(llama, PROMPTS, GREEDY, stop_ids=[])


def test_the_mesh_of_a_run_changes_no_sample_and_splits_their_rows(llama, monkeypatch):
    # Five completions, which the four groups of devices cannot share evenly.
    prompts, placement = ["Hi", "Why?", "a", "b", "c"], Placement(MeshConfig(axes={"model": 2}))
    rows, decode = [], decoding._decode
    monkeypatch.setattr(decoding, "_decode", lambda *args: rows.append(shard_rows(args[1].cache)) or decode(*args))
    samples = Samples(prompts, TOKENIZER, GREEDY, stop_ids=(), scope=placement.scope)
    samples(SimpleNamespace(state=SimpleNamespace(model=placement.put_parameters(llama))))  # type: ignore[arg-type]
    assert rows == [{2}], "five completions and three empty rows, over four groups of devices"
    assert samples.completions == [complete(llama, TOKENIZER, prompts, GREEDY)]


def shard_rows(cache) -> set[int]:
    """How many rows of a cache {layers, row, ...} a device has."""
    return {shard.data.shape[1] for leaf in jax.tree.leaves(cache) for shard in leaf.addressable_shards}


def test_a_row_that_ends_is_given_to_a_prompt_that_waits_by_the_same_program(llama, monkeypatch):
    """Rows that end at different times too: their keys are in a ring, which the second prompt of a row continues."""
    whole = generate(llama, PROMPTS, GREEDY, stop_ids=[])
    stops = {whole[0][5]}
    traces, returns, choose, decode = [], [], decoding.choose, decoding._decode
    monkeypatch.setattr(decoding, "choose", lambda *args: traces.append(args) or choose(*args))
    monkeypatch.setattr(decoding, "_decode", lambda *args: returns.append(args) or decode(*args))
    config = dataclasses.replace(GREEDY, batch_size=3, max_new_tokens=23)  # a program of its own
    cut = [until(row[:23], stops) for row in whole]
    assert generate(llama, PROMPTS, config, stop_ids=stops) == cut
    assert len(traces) == 1 and len(returns) > 2


def test_equal_prompts_are_computed_once(llama):
    requests = [decoding.Request(index, PROMPTS[4]) for index in range(40)]
    sizes = decoding.Sizes.of(llama, requests, GREEDY)
    assert (sizes.rows, sizes.packed_rows, sizes.packed_length) == (40, 1, 128)  # 65 tokens, in blocks of 64
    seated = [None] * sizes.rows
    given = decoding._seat(collections.deque(requests), seated, 0, sizes)
    assert all(seated) and (given.segments > 0).sum() == 65
    assert (given.ids.flatten()[given.source[:, :64]] == PROMPTS[4][:64]).all()


def test_layers_decode_unrolled_as_they_do_in_a_loop(llama, monkeypatch):
    expected = generate(llama, PROMPTS[:2], GREEDY, stop_ids=[])
    assert llama.for_decoding().model.layers.is_unrolled
    monkeypatch.setattr(decoder, "platform", lambda: "tpu")
    assert llama.for_decoding() is llama
    assert generate(llama, PROMPTS[:2], GREEDY, stop_ids=[]) == expected


def test_rows_are_as_many_as_the_cache_has_room_for(llama):
    requests = [decoding.Request(index, [1]) for index in range(1000)]
    config = GenerationConfig(max_new_tokens=128)
    assert decoding.Sizes.of(llama, requests, config).rows == decoding.MOST_ROWS
    assert decoding.Sizes.of(llama, requests[:3], config).rows == 3
    wide = GenerationConfig(max_new_tokens=2**20)
    numbers = 2 * llama.config.num_layers * llama.config.num_kv_heads * llama.config.head_dim * (2**20 + 32)
    assert decoding.Sizes.of(llama, requests, wide).rows == max(1, 2**30 // (4 * numbers))


def test_the_first_of_the_highest_logits_is_chosen():
    logits = np.random.default_rng(0).integers(0, 4, (50, 7)).astype(np.float32)
    np.testing.assert_array_equal(first_highest(jnp.array(logits)), logits.argmax(axis=-1))


def test_bfloat16_models_complete():
    adapted = loraize(our_model("smollm2", jnp.bfloat16), LoraConfig(r=4), key=jax.random.key(0))
    assert [len(row) for row in generate(adapted, PROMPTS[:2], SAMPLED, stop_ids=[])] == [24, 24]


def test_no_prompts_have_no_completions(llama):
    assert generate(llama, [], GREEDY, stop_ids=[]) == []


@pytest.mark.parametrize(("prompt", "says"), [([], "no tokens"), ([1, VOCAB], f"token {VOCAB}")])
def test_prompts_the_model_cannot_read_are_refused(llama, prompt, says):
    with pytest.raises(ValueError, match=rf"prompts\[1\].*{says}"):
        generate(llama, [[1], prompt], GREEDY, stop_ids=[])


def test_completions_beyond_the_context_are_warned_of(llama, caplog):
    generate(llama, [[1]], GenerationConfig(max_new_tokens=64), stop_ids=range(VOCAB))
    assert "max_position_embeddings=64" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "top_k": 0},
        {"top_p": 0.9},  # greedy
        {"batch_size": 0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=list(settings)[-1]):
        GenerationConfig(**settings)


def test_a_string_is_a_user_message_where_there_is_a_template():
    messages = [{"role": "user", "content": "Hi"}]
    rendered = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(TOKENIZER, "Hi") == encode_prompt(TOKENIZER, messages) == rendered
    assert encode_prompt(TOKENIZER, "Hi", chat=False) == TOKENIZER("Hi")["input_ids"]


def test_messages_need_a_template():
    plain = tiny_tokenizer()
    plain.chat_template = None
    assert encode_prompt(plain, "Hi") == plain("Hi")["input_ids"]
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(plain, [{"role": "user", "content": "Hi"}])


def test_a_text_to_go_on_from_is_not_ended():
    ending, end = tiny_tokenizer(), TOKENIZER.eos_token_id
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    assert ending("Hi")["input_ids"] == [*TOKENIZER("Hi")["input_ids"], end]
    assert encode_prompt(ending, "Hi", chat=False) == TOKENIZER("Hi")["input_ids"]
    assert encode_prompt(ending, "Hi</s>", chat=False)[-1] == end


def test_a_completion_is_what_transformers_writes_after_the_template(llama):
    theirs = tiny_model("smollm2")
    prompts = ["Hi", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]]
    expected = [their_completion(theirs, encode_prompt(TOKENIZER, prompt)) for prompt in prompts]
    stop = expected[1][8]
    stops = {stop, TOKENIZER.eos_token_id}
    decoded = [TOKENIZER.decode(until(row, stops), skip_special_tokens=True) for row in expected]
    assert len(decoded[1]) > 0
    assert complete(llama, TOKENIZER, prompts, GREEDY, stop_ids=[stop]) == decoded


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": 5, "config.json": 6}, {5}),
        ({"generation_config.json": [5, 7], "config.json": 6}, {5, 7}),
        ({"config.json": 6}, {6}),
        ({"generation_config.json": None}, set()),
        ({}, set()),
    ],
)
def test_stop_ids_come_from_the_generation_config(tmp_path, files, expected):
    for name, ids in files.items():
        (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    assert read_stop_ids(tmp_path) == expected


@pytest.mark.parametrize("ids", [-1, 2**31, 2.0, True, "2", [2, None], [[2]], {"a": 2}])
def test_what_is_no_token_id_is_named_with_its_file(tmp_path, ids):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* must be a token id"):
        read_stop_ids(tmp_path)


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory):
    """A PEFT adapter that changes the model."""
    folder = tmp_path_factory.mktemp("adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_the_command_completes_each_prompt(llama, tmp_path, capsys):
    jsonl, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "out.jsonl"
    jsonl.write_text('{"prompt": "Hi"}\n\n{"prompt": [{"role": "user", "content": "Why?"}]}\n')
    args = ["--model", str(FOLDER), "--prompt", "Say: [this]", "--prompts_file", str(jsonl)]
    args += ["--max_new_tokens", "24", "--system", "Be brief.", "--output", str(output)]
    completions = command.main(command.parse(args))

    system = {"role": "system", "content": "Be brief."}
    prompts = [[system, {"role": "user", "content": text}] for text in ("Say: [this]", "Hi", "Why?")]
    assert completions == complete(llama, TOKENIZER, prompts, GREEDY)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
    printed = capsys.readouterr().out
    assert all(text in printed for text in (*completions, "Say: [this]", "[system] Be brief."))


def test_the_command_completes_raw_text(llama, tmp_path):
    (tmp_path / "prompts.txt").write_text("one: a\n\ntwo\n")
    args = ["--model", str(FOLDER), "--prompts_file", str(tmp_path / "prompts.txt"), "--chat", "false"]
    args += ["--max_new_tokens", "24", "--temperature", "0.8", "--top_k", "40", "--top_p", "0.9", "--seed", "3"]
    expected = complete(llama, TOKENIZER, ["one: a", "two"], SAMPLED, chat=False)
    assert command.main(command.parse(args)) == expected


def test_the_command_reads_a_config_file(llama, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{{ mark }}{% endfor %}{{ '?' if add_generation_prompt }}"
    config = {
        "model": str(FOLDER),
        "prompts": ["Hi"],
        "chat_template": template,
        "chat_template_kwargs": {"mark": "!", "add_generation_prompt": False},
    }
    (tmp_path / "generate.yaml").write_text(json.dumps(config))
    expected = complete(llama, TOKENIZER, ["Hi!"], dataclasses.replace(GREEDY, max_new_tokens=5), chat=False)
    args = ["--config_path", str(tmp_path / "generate.yaml"), "--max_new_tokens", "5"]
    assert command.main(command.parse(args)) == expected


@pytest.mark.parametrize("named", ["as the adapter", "as the model"])
def test_the_command_completes_with_an_adapter_as_peft_does(adapter_folder, named):
    base = tiny_model("smollm2")
    theirs = peft.PeftModel.from_pretrained(base, adapter_folder).eval()
    expected = until(their_completion(theirs, encode_prompt(TOKENIZER, "Hi")), {TOKENIZER.eos_token_id})
    models = {"as the adapter": (FOLDER, adapter_folder), "as the model": (adapter_folder, None)}
    model, adapter = models[named]
    config = command.GenerateConfig(
        model=str(model), adapter=adapter and str(adapter), prompts=["Hi"], dtype="f32", max_new_tokens=24
    )
    assert command.main(config) == [TOKENIZER.decode(expected, skip_special_tokens=True)]


def test_several_adapters_share_the_base_and_the_program(adapter_folder, tmp_path, monkeypatch, capsys):
    """Of adapters that differ in their factors and their scaling, by rsLoRA too."""
    other = shutil.copytree(adapter_folder, tmp_path / "other")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 3, "use_rslora": True}))
    reads, traces = [], []
    load_model, choose = command.load_model, decoding.choose
    monkeypatch.setattr(command, "load_model", lambda *args, **kw: reads.append(args) or load_model(*args, **kw))
    monkeypatch.setattr(decoding, "choose", lambda *args: traces.append(args) or choose(*args))
    shared: dict = dict(model=str(FOLDER), prompts=["Hi", "Why?"], dtype="f32", max_new_tokens=17)
    alone = [command.main(command.GenerateConfig(adapter=path and str(path), **shared))
             for path in (None, adapter_folder, other)]  # fmt: skip
    assert len({tuple(completions) for completions in alone}) == 3
    reads.clear(), traces.clear(), capsys.readouterr()

    named = {"before": None, "loud": str(adapter_folder), "quiet": str(other)}
    jax.clear_caches()
    words = ["--model", str(FOLDER), "--adapters", json.dumps(named), "--output", str(tmp_path / "out.jsonl")]
    words += ["--prompt", "Hi", "--prompt", "Why?", "--dtype", "f32", "--max_new_tokens", "17"]
    completions = command.main(command.parse(words))
    assert completions == [of_adapter[prompt] for prompt in range(2) for of_adapter in alone]
    assert len(reads) == 1
    assert len(traces) == 2, "of the bare base and of both adapters"
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows == [
        {"prompt": prompt, "adapter": name, "completion": completions[3 * i + j]}
        for i, prompt in enumerate(("Hi", "Why?"))
        for j, name in enumerate(named)
    ]
    assert f"--- completion of quiet\n{completions[2]}" in capsys.readouterr().out


def test_an_adapter_without_its_base_says_what_to_set(adapter_folder, tmp_path):
    settings = json.loads((adapter_folder / "adapter_config.json").read_text())
    for base in ("./gone", None):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        with pytest.raises((FileNotFoundError, ValueError), match="base_model_name_or_path=.*Set model to the base"):
            command.main(command.GenerateConfig(model=str(tmp_path), prompts=["Hi"]))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "./gone"}, "model: ./gone"),
        ({"adapter": "./gone"}, "adapter: ./gone"),
        ({"adapter": "MODEL"}, "adapter=.*no adapter_config.json"),
        ({"model": "ADAPTER", "adapter": "ADAPTER"}, "model=.*is an adapter itself"),
        ({"adapters": {"a": "./gone"}}, r"adapters\.a: ./gone"),
        ({"adapters": {"a": None, "b": "MODEL"}}, r"adapters\.b=.*no adapter_config.json"),
        ({"model": "ADAPTER", "adapters": {"a": None}}, r"model=.*is an adapter itself, and adapters\.a=None"),
        ({"adapter": "ADAPTER", "adapters": {"a": None}}, "adapter and adapters set the same"),
        ({"tokenizer": "ADAPTER"}, "set tokenizer"),
        ({"prompts_file": "./gone.txt"}, "prompts_file='./gone.txt'"),
        ({"prompts": [], "prompts_file": None}, "prompts"),
        ({"system": "Be brief.", "chat": False}, "system"),
        ({"dtype": "f16"}, "dtype"),
    ],
)
def test_the_command_names_the_setting_that_is_wrong(adapter_folder, settings, says):
    paths = {"MODEL": str(FOLDER), "ADAPTER": str(adapter_folder)}
    settings = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    if "adapters" in settings:
        settings["adapters"] = {name: paths.get(path, path) for name, path in settings["adapters"].items()}
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        command.main(command.GenerateConfig(**{"model": str(FOLDER), "prompts": ["Hi"], **settings}))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": "Hi"}\n{"chosen": "x"}\n', r"row 2: needs `prompt`.*found \['chosen'\]"),
        ("p.jsonl", '{"prompt": []}\n', "row 1: needs `prompt`"),
        ("p.jsonl", '{"prompt": [{"content": "x"}]}\n', "row 1: message 1 of 'prompt' needs 'role' and 'content'"),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', "row 1: message 1 of 'prompt' has a role and nothing else"),
        (
            "p.jsonl",
            '{"prompt": [{"role": "user", "content": 3}]}\n',
            "row 1: the content of message 1 of 'prompt' is int 3",
        ),
        ("p.jsonl", '"Hi"\n', "row 1: needs `prompt`"),
        ("p.jsonl", "{\n", "row 1: is not JSON"),
        ("p.csv", "Hi\n", "suffix must be"),
        ("p.txt", "\n", "holds no prompts"),
    ],
)
def test_prompt_files_are_refused_by_row(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        command.main(command.GenerateConfig(model=str(FOLDER), prompts_file=str(tmp_path / name)))


def test_a_prompt_is_said_one_way_only():
    with pytest.raises(ValueError, match="--prompt and --prompts"):
        command.parse(["--model", "m", "--prompt", "a", "--prompts", "[b]"])


TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.mark.parametrize("given", [["--chat_template", TEMPLATE], [f"--chat_template={TEMPLATE}"]])
def test_texts_are_taken_from_the_command_line_as_they_stand(given):
    config = command.parse(["--model", "m", "--prompt", "a", "--system", "Say: [this]", *given])
    assert (config.chat_template, config.system) == (TEMPLATE, "Say: [this]")
    nothing = command.parse(["--model", "m", "--prompt", "a", "--system", "null", "--chat_template", "null"])
    assert (nothing.chat_template, nothing.system) == (None, None)


@pytest.fixture
def rendered(monkeypatch):
    """What the command would give the model to complete, as text."""
    monkeypatch.setattr(command, "load_model", lambda *_, **__: None)
    monkeypatch.setattr("lora_dpo_jax.generation.generate", lambda model, ids, *_, **__: ids)
    return lambda **settings: command.main(
        command.GenerateConfig(**{"model": str(FOLDER), "prompts": ["Hi"], **settings})
    )


def test_a_template_is_a_text_or_the_path_of_one(rendered, tmp_path):
    (tmp_path / "mine.jinja").write_text(TEMPLATE)
    assert rendered(chat_template=TEMPLATE) == rendered(chat_template=str(tmp_path / "mine.jinja")) == ["[Hi]"]


@pytest.mark.parametrize(
    "message", [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {"from": "human", "value": "Hi"}]
)
def test_messages_of_a_file_are_read_as_those_that_are_trained_on(rendered, tmp_path, message):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": [message]}))
    assert rendered(prompts=[], prompts_file=str(path), chat_template=TEMPLATE) == ["[Hi]"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"chat_template": "gone.jinja"}, "chat_template='gone.jinja' is neither a Jinja template nor a file"),
        ({"chat_template": "x" * 5000}, "chat_template='xx.* is neither"),
        ({"chat_template": "BINARY"}, "chat_template=.*cannot be read as UTF-8"),
        ({"chat_template": "{% for m in messages %}"}, r"prompts\[0\]: the chat template is not valid Jinja: line 1"),
        ({"chat_template": "{{ raise_exception('no') }}"}, r"prompts\[0\]: the chat template rejects it: no"),
        ({"prompts": ["a", "b\udcff"]}, r"prompts\[1\]: holds half of a surrogate pair"),
        (
            {"prompts": [], "prompts_file": "LINES", "chat_template": "{{ 1 / 0 }}"},
            "line 2: the chat template rejects it",
        ),
        ({"prompts_file": "ROWS"}, r"row 3: .*content"),
        ({"prompts_file": "ROWS", "system": "x"}, "row 3"),
        ({"chat_template_kwargs": {"tokenize": False}}, r"chat_template_kwargs may not set \['tokenize'\]"),
        ({"chat_template_kwargs": {"chat": False, "origins": 1}}, r"may not set \['chat', 'origins'\]"),
        ({"chat_template_kwargs": {"messages": []}}, r"may not set \['messages'\]"),
    ],
)
def test_what_a_template_cannot_render_is_named(rendered, tmp_path, settings, says):
    files = {
        "BINARY": (tmp_path / "t.jinja", b"{{ \xff }}"),
        "LINES": (tmp_path / "p.txt", b"\nHi\n"),
        "ROWS": (tmp_path / "p.jsonl", b'{"prompt": "Hi"}\n\n{"prompt": [{"role": "user", "content": 3}]}\n'),
    }
    for path, content in files.values():
        path.write_bytes(content)
    settings = {key: str(files[value][0]) if value in [*files] else value for key, value in settings.items()}
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        rendered(**settings)


def test_what_a_template_cannot_render_is_told_before_the_weights_are_read(monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=r"^prompts\[0\]: the chat template is not valid Jinja"):
        command.main(command.GenerateConfig(model=str(FOLDER), prompts=["Hi"], chat_template="{% for"))


def test_an_adapter_brings_the_template_it_was_trained_with(rendered, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "load_adapter", lambda model, *_, **__: model)
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_folder, folder)
    assert rendered(model=str(folder)) == rendered()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_tokenizer(tokenizer, folder)
    assert rendered(model=str(folder)) == rendered(adapter=str(folder)) == ["[Hi]"]
    assert rendered(model=str(folder), tokenizer=str(FOLDER)) == rendered()
