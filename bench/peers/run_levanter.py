"""Levanter's LoRA-DPO: its model, adapters and `dpo_loss` in a jitted step. Environment: levanter.

Every sequence is padded to --seq-len, as its data set does. Gradient checkpointing is on unless
--no-gradient-checkpointing is given, as it is the default of its models. Its Trainer and data loader are left out.
"""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from haliax import Axis
from levanter.adaptor.lora import LoraConfig, lora_trainable_params_filter, loraize, unwrap_lora_modules
from levanter.data.loader import stack_tree
from levanter.data.text.preference import DpoExample
from levanter.dpo import dpo_loss
from levanter.models.llama import LlamaConfig, LlamaLMHeadModel
from levanter.models.lm_model import LmExample
from levanter.utils.tree_utils import inference_mode

from bench.measure import host
from bench.peers.common import BETA, LEARNING_RATE, TARGETS, Benchmark, Pair, model_config, parser


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--seq-len", type=int, default=512, help="Levanter's train_seq_len")
    arguments.add_argument("--no-gradient-checkpointing", action="store_true")
    a = arguments.parse_args()
    benchmark = Benchmark(a)
    losses = []
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    with hax.partitioning.set_mesh(mesh), hax.axis_mapping({"batch": "data"}):
        model = adapted_model(a)
        trainable, frozen = eqx.partition(model, lora_trainable_params_filter(model))
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=0.0)
        state = optimizer.init(eqx.filter(trainable, eqx.is_inexact_array))
        step = make_step(optimizer)
        benchmark.meter.begin()
        for number in range(benchmark.num_steps):
            example = padded(benchmark.batch(number), a.seq_len)
            trainable, state, loss = step(trainable, frozen, state, example)
            losses.append(float(loss))  # waits for the step
            benchmark.meter.end_step()
    benchmark.report(
        f"levanter-{a.seq_len}" + ("-nogc" if a.no_gradient_checkpointing else ""),
        losses=losses,
        device=host() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        packages=["marin-levanter", "marin-haliax", "jax"],
        padded_to=a.seq_len,
    )


def adapted_model(a):
    hf = model_config(a.model)
    asked = LlamaConfig(
        max_seq_len=a.seq_len,
        hidden_dim=hf["hidden_size"],
        intermediate_dim=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        layer_norm_epsilon=hf["rms_norm_eps"],
        tie_word_embeddings=hf["tie_word_embeddings"],
        reference_checkpoint=a.model,
        tokenizer=a.model,
    )
    converter = asked.hf_checkpoint_converter(ref_checkpoint=a.model)
    config = dataclasses.replace(
        converter.config_from_hf_checkpoint(a.model),
        max_seq_len=a.seq_len,
        gradient_checkpointing=not a.no_gradient_checkpointing,
    )
    base = converter.load_pretrained(LlamaLMHeadModel, ref=a.model, config=config, dtype=jnp.dtype(a.dtype))
    lora = LoraConfig(target_modules=TARGETS, r=a.r, alpha=a.alpha, zero_init_b=True, a_init_mode="random")
    return loraize(base, lora, key=jax.random.PRNGKey(1))


def make_step(optimizer: optax.GradientTransformation):
    def loss_of(trainable, frozen, example):
        model = eqx.combine(trainable, frozen)
        reference = inference_mode(unwrap_lora_modules(model), True)
        return dpo_loss(model, reference, example, beta=BETA)

    @hax.named_jit(donate_args=(True, False, True, False))
    def step(trainable, frozen, state, example):
        (loss, _), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(trainable, frozen, example)
        updates, state = optimizer.update(gradients, state, eqx.filter(trainable, eqx.is_inexact_array))
        return eqx.apply_updates(trainable, updates), state, loss

    return step


def padded(pairs: list[Pair], length: int) -> DpoExample:
    return DpoExample(*(sequences(pairs, key, length) for key in ("chosen_ids", "rejected_ids")))


def sequences(pairs: list[Pair], key: str, length: int) -> LmExample:
    """Prompt and one response a row; the loss weighs the positions that predict the response."""
    Pos = Axis("position", length)
    examples = []
    for pair in pairs:
        ids, prompt = pair["prompt_ids"] + pair[key], len(pair["prompt_ids"])
        if len(ids) > length:
            raise SystemExit(f"a pair has a sequence of {len(ids)} tokens, more than --seq-len {length}")
        tokens, weight = np.zeros(length, np.int32), np.zeros(length, np.float32)
        segments = np.full(length, -1, np.int32)
        tokens[: len(ids)], segments[: len(ids)] = ids, 0
        weight[prompt - 1 : len(ids) - 1] = 1.0
        named = [hax.named(jnp.asarray(array), (Pos,)) for array in (tokens, weight, segments)]
        examples.append(LmExample.causal(tokens=named[0], loss_weight=named[1], segment_ids=named[2]))
    return stack_tree(Axis("batch", len(pairs)), examples)


if __name__ == "__main__":
    main()
