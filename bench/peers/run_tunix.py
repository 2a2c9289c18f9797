"""Tunix's DPOTrainer with qwix adapters. Environment: tunix.

It pads prompts on the left to one length and responses on the right to another; here these are the longest of the data,
the tightest that cut nothing. Its llama3 rotates by a fixed theta whatever the model's (0.1.7), so its losses differ
from the others' while its speed does not. Timed are its own preparation of inputs and its own jitted step, without the
loop around them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.sft.dpo import dpo_trainer

from bench.measure import host
from bench.peers.common import BETA, LEARNING_RATE, TARGETS, Benchmark, Pair, model_config, parser


def main() -> None:
    a = parser(__doc__).parse_args()
    benchmark = Benchmark(a)
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with mesh:
        trainer = make_trainer(a, mesh)
        step, _ = trainer.jit_train_and_eval_step(False, True)
        prompt_length = max(len(pair["prompt_ids"]) for pair in benchmark.pairs)
        response_length = max(len(pair[key]) for pair in benchmark.pairs for key in ("chosen_ids", "rejected_ids"))
        losses = []
        benchmark.meter.begin()
        for number in range(benchmark.num_steps):
            inputs = padded(benchmark.batch(number), prompt_length, response_length)
            loss, _, _ = step(trainer._prepare_inputs(inputs))
            losses.append(float(loss))  # waits for the step
            benchmark.meter.end_step()
    benchmark.report(
        "tunix",
        losses=losses,
        device=host() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        packages=["google-tunix", "qwix", "flax", "jax"],
        padded_to=prompt_length + response_length,
    )


def make_trainer(a, mesh) -> dpo_trainer.DPOTrainer:
    hf = model_config(a.model)
    heads = hf["num_attention_heads"]
    config = llama3.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=heads,
        head_dim=hf.get("head_dim", hf["hidden_size"] // heads),
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        weight_tying=hf["tie_word_embeddings"],
        remat_config=llama3.RematConfig.NONE,  # Tunix's default
    )
    base = llama3_params.create_model_from_safe_tensors(a.model, config, mesh, dtype=jnp.dtype(a.dtype))
    adapters = qwix.LoraProvider(module_path=f".*({'|'.join(TARGETS)})", rank=a.r, alpha=a.alpha)
    policy = qwix.apply_lora_to_model(base, adapters, **base.get_model_input(), rngs=nnx.Rngs(0))
    return dpo_trainer.DPOTrainer(
        model=policy,
        ref_model=base,
        optimizer=optax.adamw(LEARNING_RATE, weight_decay=0.0),
        training_config=dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=10**6, beta=BETA),
    )


def padded(pairs: list[Pair], prompt_length: int, response_length: int) -> dpo_trainer.TrainingInput:
    arrays = {}
    for name, length in (("prompt", prompt_length), ("chosen", response_length), ("rejected", response_length)):
        ids, mask = (np.zeros((len(pairs), length), np.int32) for _ in range(2))
        for row, pair in enumerate(pairs):
            tokens = pair[f"{name}_ids"]
            place = slice(length - len(tokens), length) if name == "prompt" else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        arrays |= {f"{name}_ids": jnp.asarray(ids), f"{name}_mask": jnp.asarray(mask)}
    return dpo_trainer.TrainingInput(**arrays)


if __name__ == "__main__":
    main()
