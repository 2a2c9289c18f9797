"""Makes the quickstart model and its preference pairs from nothing: no download, half an hour of a busy CPU core.

    python examples/quickstart/make.py

writes, beside this file,

- `model/`: a Llama of 1.2 million parameters with its tokenizer and chat template, in Hugging Face's format. It has
  read nothing but `everyday.py`, where every question is answered as often in the warm manner as in the grumpy one,
  so it does either, whatever it is asked.
- `train.jsonl`, `test.jsonl`: pairs that prefer the warm manner. The test pairs are about other facts than the
  training pairs, and their prompts are kept out of the model's own training too.

Everything is drawn from `SEED`: text, tokenizer and pairs come out the same anywhere, the weights the same on the same
machine and versions.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from everyday import Fact, Manner, all_facts, ask, reply
from haliax import Axis, NamedArray
from haliax.state_dict import to_torch_compatible_state_dict
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_dpo_jax.models import CausalLM, PackedMask, config_from_hf

HERE = Path(__file__).parent
SEED = 20240

TRAIN_PAIRS, TEST_PAIRS = 600, 200
TEST_FACTS = 130  # of the four hundred; only these are asked about in the test pairs

# Pre-training
DOCUMENTS = 52_000  # a prompt with one response, 43 tokens on average
ROWS, ROW_LENGTH = 16, 128  # of a batch; two or three documents share a row
PEAK_LEARNING_RATE, WARMUP_STEPS = 3e-3, 100

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1536,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "use_cache": True,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def main():
    rng = random.Random(SEED)
    facts = all_facts()
    rng.shuffle(facts)
    test = draw_pairs(facts[:TEST_FACTS], TEST_PAIRS, rng)
    train = draw_pairs(facts[TEST_FACTS:], TRAIN_PAIRS, rng)
    write_pairs(HERE / "train.jsonl", train)
    write_pairs(HERE / "test.jsonl", test)

    documents = draw_documents(facts, {prompt_of(pair) for pair in test}, rng)
    folder = HERE / "model"
    folder.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(documents)
    write_tokenizer_and_config(folder, tokenizer)
    batches = pack([tokenizer.apply_chat_template(d, tokenize=False) for d in documents], tokenizer)
    save_weights(folder, pretrain(batches))


# --- Text -------------------------------------------------------------------------------------------------------------


def draw_pairs(facts: list[Fact], count: int, rng: random.Random) -> list[dict]:
    """`count` pairs with different prompts, going round `facts` in turn; the warm reply is the chosen one."""
    pairs: dict[str, dict] = {}
    while len(pairs) < count:
        fact = facts[len(pairs) % len(facts)]
        prompt = ask(fact, rng)
        if prompt not in pairs:
            warm, grumpy = chat(prompt, fact, "warm", rng), chat(prompt, fact, "grumpy", rng)
            pairs[prompt] = {"chosen": warm, "rejected": grumpy}
    return list(pairs.values())


def chat(prompt: str, fact: Fact, manner: Manner, rng: random.Random) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply(fact, manner, rng)}]


def prompt_of(pair: dict) -> str:
    return pair["chosen"][0]["content"]


def write_pairs(path: Path, pairs: list[dict]):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def draw_documents(facts: list[Fact], kept_out: set[str], rng: random.Random) -> list[list[dict]]:
    """Chats on all facts, each prompt once in either manner, none of the prompts in `kept_out`."""
    documents = []
    while len(documents) < DOCUMENTS:
        fact = rng.choice(facts)
        prompt = ask(fact, rng)
        if prompt not in kept_out:
            documents += [chat(prompt, fact, "warm", rng), chat(prompt, fact, "grumpy", rng)]
    rng.shuffle(documents)
    return documents


# --- Tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(documents: list[list[dict]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[START, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}" for document in documents for message in document)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def write_tokenizer_and_config(folder: Path, tokenizer: PreTrainedTokenizerFast):
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    generation = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 64, **ids}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


# --- Pre-training -----------------------------------------------------------------------------------------------------


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, np.ndarray]:
    """Lays whole texts into rows; int32 {batch, row, position} of `ids`, `segments` (0 = padding) and `positions`."""
    rows, room = [], 0
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        if len(ids) > room:
            rows.append([])
            room = ROW_LENGTH
        rows[-1].append(ids)
        room -= len(ids)
    rows = rows[: len(rows) // ROWS * ROWS]
    packed = {name: np.zeros((len(rows), ROW_LENGTH), np.int32) for name in ("ids", "segments", "positions")}
    for r, texts_of_row in enumerate(rows):
        start = 0
        for segment, ids in enumerate(texts_of_row, start=1):
            place = slice(start, start + len(ids))
            packed["ids"][r, place], packed["segments"][r, place] = ids, segment
            packed["positions"][r, place] = range(len(ids))
            start += len(ids)
    return {name: array.reshape(-1, ROWS, ROW_LENGTH) for name, array in packed.items()}


def pretrain(batches: dict[str, np.ndarray]) -> CausalLM:
    """Next-token prediction over everything, prompts included; one pass."""
    steps = len(batches["ids"])
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, WARMUP_STEPS, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    model = CausalLM.init(config_from_hf(CONFIG), key=jax.random.key(SEED))
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    print(f"{sum(x.size for x in jax.tree.leaves(eqx.filter(model, eqx.is_array))):,} parameters, {steps} steps")

    @eqx.filter_jit(donate="all")
    def train_step(model, state, batch):
        loss, gradients = eqx.filter_value_and_grad(next_token_loss)(model, batch)
        updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss

    began = time.perf_counter()
    for step in range(steps):
        batch = {name: jnp.asarray(array[step]) for name, array in batches.items()}
        model, state, loss = train_step(model, state, batch)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss:.3f} nats per token, {time.perf_counter() - began:.0f} s", flush=True)
    return model


def next_token_loss(model: CausalLM, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy, in nats, of each token given those before it in its own document."""
    Row, Pos = Axis("row", ROWS), Axis("position", ROW_LENGTH)
    ids, segments, positions = (hax.named(batch[name], (Row, Pos)) for name in ("ids", "segments", "positions"))
    logits: NamedArray = model(ids, positions, PackedMask(segments, segments * 0, positions))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.array[:, :-1], batch["ids"][:, 1:])
    counts = (batch["segments"][:, 1:] == batch["segments"][:, :-1]) & (batch["segments"][:, 1:] > 0)
    return jnp.sum(losses * counts) / jnp.sum(counts)


def save_weights(folder: Path, model: CausalLM):
    arrays = to_torch_compatible_state_dict(model)
    arrays = {name: np.asarray(array).astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
