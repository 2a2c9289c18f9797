"""From the same adapter, rows and settings, a run takes the steps that TRL's DPOTrainer takes, live, in float32.

TRL reads the text of the rows and tokenizes it by itself; ours is a whole run, from YAML-like settings to files.
"""

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny_runs import TRL_RUN, instruct_folder, preference_rows, run_config, training_metrics, write_rows

from lora_dpo_jax.main.train import main

STEPS, BATCH = 6, 4
LEARNING_RATE, WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM, BETA = 1e-3, 2, 0.01, 1.0, 0.1
ROWS = preference_rows(STEPS * BATCH)
EVERY_LAYER = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
# How the rows of a batch are laid over the eight devices that tests have: together, or one packed row after the other.
LAYOUTS = {
    "one row a device": {},
    "micro-batches of one row": {"trainer__per_device_parallelism": 1, "trainer__mesh": {"compute_mapping": {}}},
}
# In nats, or beta times nats; log-probs are about -100, where float32 resolves 1e-5.
ABSOLUTE = ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins"]
RELATIVE = {"logps/chosen": 1e-5, "logps/rejected": 1e-5, "grad_norm": 1e-3, "learning_rate": 1e-6}


@dataclass(frozen=True)
class TrlRun:
    start: Path  # the adapter both begin with
    initial: dict[str, np.ndarray]
    final: dict[str, np.ndarray]
    metrics: list[dict[str, float]]


@pytest.fixture(scope="module")
def start_adapter(tmp_path_factory):
    """start_adapter(zero_B): a folder with a new adapter made by PEFT, of which B is zero or random."""

    def make(zero_B: bool, base: Path | None = None, **targets: list[str]) -> Path:
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4,
            lora_alpha=8,
            **(targets or EVERY_LAYER),
            init_lora_weights=zero_B,  # false: PEFT draws B too, for gradients in which nothing vanishes
            task_type="CAUSAL_LM",
        )
        folder = tmp_path_factory.mktemp("start")
        peft.get_peft_model(base_model(base), config).save_pretrained(str(folder))
        return folder

    return make


def base_model(folder: Path | None = None):
    return transformers.AutoModelForCausalLM.from_pretrained(folder or instruct_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def trl_run(tmp_path_factory):
    """trl_run(start, loss_type): TRL's metrics and final adapter; from an adapter whose B is not zero, TRL takes a
    frozen copy of it as the reference, from a new one likewise, which is then the base. `length` is its setting."""

    def train(
        start: Path, loss_type: str, rows: list[dict] = ROWS, base: Path | None = None, **length: float
    ) -> TrlRun:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            import datasets
            from trl import DPOConfig, DPOTrainer

            datasets.disable_progress_bars()
            logging.getLogger("trl").setLevel(logging.ERROR)
            trainer = DPOTrainer(
                peft.PeftModel.from_pretrained(base_model(base), start, is_trainable=True),
                args=DPOConfig(
                    str(tmp_path_factory.mktemp("trl")),
                    **(length or {"max_steps": STEPS}),
                    per_device_train_batch_size=BATCH,
                    learning_rate=LEARNING_RATE,
                    lr_scheduler_type="linear",
                    warmup_steps=WARMUP,
                    weight_decay=WEIGHT_DECAY,
                    max_grad_norm=MAX_GRAD_NORM,
                    beta=BETA,
                    loss_type=[loss_type],
                    **TRL_RUN,
                ),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=transformers.AutoTokenizer.from_pretrained(instruct_folder()),
            )
            initial, final = adapter_of(trainer.model), (trainer.train(), adapter_of(trainer.model))[1]
        return TrlRun(start, initial, final, [line for line in trainer.state.log_history if "loss" in line])

    return train


def adapter_of(model) -> dict[str, np.ndarray]:
    tensors = peft.get_peft_model_state_dict(model, adapter_name="default")
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def our_run(
    tmp_path: Path, start: Path, loss_type: str, rows: list[dict] = ROWS, **settings
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The metrics that a run logs, and the adapter that it exports."""
    config = run_config(
        tmp_path,
        write_rows(tmp_path / "train.jsonl", rows),
        initialize_from_peft=str(start),
        loss={"type": loss_type, "beta": BETA},
        model__attention="auto",
        peft_save_path=str(tmp_path / "adapter"),
        trainer__train_batch_size=BATCH,
        optimizer={
            "learning_rate": LEARNING_RATE,
            "lr_schedule": "linear",
            "warmup": WARMUP,
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MAX_GRAD_NORM,
        },
        **{"trainer__num_train_steps": STEPS, **settings},
    )
    main(config)
    return training_metrics(config), load_file(tmp_path / "adapter" / "adapter_model.safetensors")


def assert_same_run(
    ours: list[dict], our_adapter: dict[str, np.ndarray], theirs: TrlRun, *, rewards: bool = True
) -> None:
    assert len(ours) == len(theirs.metrics) > 1

    def of(name: str) -> tuple[list[float], list[float]]:
        return [line[f"train/{name}"] for line in ours], [line[name] for line in theirs.metrics]

    for name in (name for name in ABSOLUTE if rewards or not name.startswith("rewards/")):
        np.testing.assert_allclose(*of(name), rtol=0, atol=1e-4, err_msg=name)
    for name, tolerance in RELATIVE.items():
        np.testing.assert_allclose(*of(name), rtol=tolerance, err_msg=name)
    # The first update of the warmup has rate 0: until the second one, all pairs are ties, and none counts as won.
    if rewards:
        np.testing.assert_array_equal(*of("rewards/accuracies"))
    assert our_adapter.keys() == theirs.final.keys()
    for name, tensor in theirs.final.items():
        assert distance(our_adapter[name], tensor) < 5e-3 * np.linalg.norm(tensor), name
    # All tensors together, against how far training moved them.
    moved = sum(distance(theirs.initial[name], tensor) ** 2 for name, tensor in theirs.final.items())
    apart = sum(distance(our_adapter[name], tensor) ** 2 for name, tensor in theirs.final.items())
    assert apart**0.5 < 5e-3 * moved**0.5


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b))


@pytest.fixture(scope="module")
def trl_from_random_B(start_adapter, trl_run) -> TrlRun:
    return trl_run(start_adapter(zero_B=False), "sigmoid")


def test_the_comparison_is_of_a_run_that_learns(trl_from_random_B):
    losses = [line["loss"] for line in trl_from_random_B.metrics]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and min(losses[2:]) < 0.68
    assert min(line["grad_norm"] for line in trl_from_random_B.metrics) > 1e-2
    assert max(line["grad_norm"] for line in trl_from_random_B.metrics) > MAX_GRAD_NORM  # clipping takes part


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_from_an_adapter_matches_trl(trl_from_random_B, tmp_path, layout):
    """The reference is the adapter as it was given."""
    ours = our_run(tmp_path, trl_from_random_B.start, "sigmoid", **LAYOUTS[layout])
    assert_same_run(*ours, trl_from_random_B)


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm"])
def test_a_run_from_a_new_adapter_matches_trl(start_adapter, trl_run, tmp_path, loss_type):
    """The reference is the base."""
    theirs = trl_run(start_adapter(zero_B=True), loss_type)
    ours = our_run(tmp_path, theirs.start, loss_type, peft_reference="base")
    # TRL logs rewards of sums for a loss of means per token; ours are those that the loss compares.
    assert_same_run(*ours, theirs, rewards=loss_type == "sigmoid")


def test_epochs_that_end_with_a_short_batch_match_trl(start_adapter, trl_run, tmp_path):
    """Two of ten pairs, in batches of 4, 4 and 2."""
    theirs = trl_run(start_adapter(zero_B=False), "sigmoid", ROWS[:10], num_train_epochs=2)
    length = {"trainer__num_train_steps": None, "trainer__num_train_epochs": 2}
    ours = our_run(tmp_path, theirs.start, "sigmoid", ROWS[:10], **length)
    assert_same_run(*ours, theirs)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Path:
    """A random Mixtral with four experts, two of them active, and the tokenizer of the other runs."""
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(instruct_folder())
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_local_experts=4,
        initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_three_steps_over_experts_match_trl(start_adapter, trl_run, mixture, tmp_path):
    """With adapters on the parameters of all experts and on two layers beside them."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    start = start_adapter(False, mixture, target_modules=["q_proj", "o_proj"], target_parameters=parameters)
    theirs = trl_run(start, "sigmoid", base=mixture, max_steps=3, router_aux_loss_coef=0.0)
    ours = our_run(tmp_path, start, "sigmoid", initialize_from_hf=str(mixture), trainer__num_train_steps=3)
    assert sum(".experts." in name for name in theirs.final) == 2 * 2 * 2
    assert_same_run(*ours, theirs)
