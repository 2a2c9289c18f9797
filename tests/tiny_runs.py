"""A tiny instruct model with a tokenizer trained here, preference rows, and runs over them."""

import functools
import gzip
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import draccus
import numpy as np
import safetensors.numpy
import tokenizers
import transformers
from chat_templates import CHATML

from lora_dpo_jax.runs.config import TrainConfig

SESSION_FOLDER = tempfile.TemporaryDirectory(prefix="tiny_runs_")  # removed when the interpreter exits

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
VOCAB = 300  # of the tokenizer and the model
WORDS = "the a owl cat tree river moon small quiet green sleeps sings runs under over near and then why where".split()

# Of TRL's configs: rows in their order, on the CPU, in float32, with nothing written.
TRL_RUN: dict[str, Any] = {
    "max_length": 256,
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def preference_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one or three turns, some with a system message; every prompt is another one."""
    rng = random.Random(seed)

    def says(role: str, most: int, least: int = 2) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(least, most)))}

    rows = []
    for number in range(count):
        prompt = [says("system", 4)] if number % 3 == 0 else []
        if number % 4 == 1:
            prompt += [says("user", 4), says("assistant", 4)]
        prompt.append({"role": "user", "content": f"{number}: {says('user', 8)['content']}?"})
        rows.append({"prompt": prompt, "chosen": [says("assistant", 12)], "rejected": [says("assistant", 12)]})
    return rows


def plain_rows(count: int, *, seed: int = 1) -> list[dict[str, str]]:
    """The same as text, without roles."""
    return [
        {
            "prompt": row["prompt"][-1]["content"],
            "chosen": " " + row["chosen"][0]["content"],
            "rejected": " " + row["rejected"][0]["content"],
        }
        for row in preference_rows(count, seed=seed)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As jsonl, compressed if the suffix says so."""
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@functools.cache
def instruct_folder() -> Path:
    """A random float32 Llama with its tokenizer and chat template, as users find one. Do not write."""
    folder = Path(SESSION_FOLDER.name) / "instruct"
    tokenizer = _train_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,  # large enough that attention and predictions are far from uniform
        dtype="float32",
        **ends,
    )
    config.save_pretrained(folder)
    transformers.GenerationConfig(**ends).save_pretrained(folder)
    safetensors.numpy.save_file(_random_weights(config), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def run_config(tmp_path: Path, train: Path, **settings: Any) -> TrainConfig:
    """A short run over the rows in `train`, in file order, with all it writes in `tmp_path`.

    `settings` are as on the command line, with dots for underscores between sections: `trainer__seed=1`.
    """
    tree: dict[str, Any] = {
        "initialize_from_hf": str(instruct_folder()),
        "data": {
            "components": {"prefs": {"source": {"type": "url", "train_urls": [str(train)]}}},
            "cache_dir": str(tmp_path / "cache"),
            "shuffle": False,
        },
        "train_seq_len": 256,
        "validation_split_fraction": 0.0,
        "model": {"gradient_checkpointing": "none", "attention": "dense"},  # traced and compiled soonest
        "trainer": {"num_train_steps": 2, "train_batch_size": 4, "log_dir": str(tmp_path / "logs"), "id": "run"},
        "lora": {"r": 4, "alpha": 8.0},
        "report": False,  # tests/report/ is about it
    }
    for name, value in settings.items():
        *sections, key = name.split("__")
        functools.reduce(lambda node, section: node.setdefault(section, {}), sections, tree)[key] = value
    return draccus.decode(TrainConfig, tree)


def read_metrics(config: TrainConfig) -> list[dict[str, float]]:
    path = config.trainer.run_dir(config.trainer.run_id()) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_metrics(config: TrainConfig) -> list[dict[str, float]]:
    """Those of each training step."""
    return [line for line in read_metrics(config) if "train/loss" in line]


def _random_weights(config: transformers.LlamaConfig) -> dict[str, np.ndarray]:
    """Of all tensors, norms included."""
    hidden, mlp, keys = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens": (VOCAB, hidden), "model.norm": (hidden,), "lm_head": (VOCAB, hidden)}
    for number in range(config.num_hidden_layers):
        layer = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        mean = 1.0 if "norm" in name else 0.0
        return rng.normal(mean, config.initializer_range, shape).astype(np.float32)

    return {f"{name}.weight": draw(name, shape) for name, shape in shapes.items()}


def _train_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level, with merges, so that texts have other lengths in tokens than in characters."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = CHATML
    return fast
