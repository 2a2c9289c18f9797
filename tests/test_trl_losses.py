"""Three steps with each of TRL's losses and options, live and in float32, are three steps with ours.

`tests/test_trl_parity.py` compares whole runs. Here, TRL's trainer and model are made once, and both sides take their
steps on the same token ids, from the same adapter and with another adapter as the reference.
"""

import dataclasses
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny_models import load
from tiny_pairs import packed, table_of
from tiny_runs import instruct_folder, preference_rows

from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.mismatched import with_mismatched_answers
from lora_dpo_jax.data.shapes import PartShape
from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
from lora_dpo_jax.log_probs import score_with_reference
from lora_dpo_jax.lora import LoraConfig, frozen_copy, trainable_filter
from lora_dpo_jax.losses import LOSSES, Loss, Scores, token_metrics
from lora_dpo_jax.training.optimizer import OptimizerConfig

STEPS, BATCH, RATE = 3, 4, 1e-3
# Of AdamW. With its usual 1e-8, a gradient that is rounding alone may become a step of the learning rate: one element
# of an adapter ended 7e-4 from TRL's, and all others at most 9e-6.
EPSILON = 1e-6
STATISTICS = ("log_sum_of_squares", *token_metrics.STATISTICS)
BETA = 0.1
DIVERGENCES = ["forward_kl", "js_divergence", "alpha_divergence"]
OF_MARGIN = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]
SMOOTHED = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
OTHERS = ["nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "sft"]


def ours(name: str, **settings) -> Loss:
    smoothing = {"label_smoothing": SMOOTHED[name]} if name in SMOOTHED else {}
    return LOSSES[name](**{"beta": BETA, **smoothing, **settings})


def mix(weights: list[float], *names: str, **settings) -> Loss:
    return LOSSES["mix"](losses=[ours(name, **settings if name != "sft" else {}) for name in names], weights=weights)


# Our loss, and TRL's settings.
CASES: dict[str, tuple[Loss, dict]] = {name: (ours(name), {"loss_types": [name]}) for name in [*OF_MARGIN, *OTHERS]}
# With a beta of 0.1 it is about 50 and multiplies each rounding of a log-prob by 10.
CASES["sppo_hard"] = ours("sppo_hard", beta=0.5), {"loss_types": ["sppo_hard"], "beta": 0.5}
for _name in OF_MARGIN:
    for _divergence in DIVERGENCES:
        _settings = {"f_divergence_type": _divergence, "f_alpha_divergence_coef": 0.3}
        CASES[f"{_name}, {_divergence}"] = ours(_name, **_settings), {"loss_types": [_name], **_settings}
for _name in ["sigmoid", "sigmoid_norm", "ipo", "bco_pair"]:
    CASES[f"{_name}, WPO"] = ours(_name, use_weighting=True), {"loss_types": [_name], "use_weighting": True}
    CASES[f"{_name}, LD-DPO"] = ours(_name, ld_alpha=0.4), {"loss_types": [_name], "ld_alpha": 0.4}
CASES["MPO"] = (
    mix([0.8, 0.2, 1.0], "sigmoid", "bco_pair", "sft"),
    {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
)
CASES["a mix with a divergence and LD-DPO"] = (
    mix([1.0, 0.5, 0.25], "hinge", "discopop", "sft", f_divergence_type="js_divergence", ld_alpha=0.4),
    {
        "loss_types": ["hinge", "discopop", "sft"],
        "loss_weights": [1.0, 0.5, 0.25],
        "f_divergence_type": "js_divergence",
        "ld_alpha": 0.4,
    },
)
DEFAULTS = {
    "beta": BETA,
    "loss_weights": [1.0],
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "label_smoothing": 0.0,
}


@dataclass(frozen=True)
class Steps:
    losses: list[float]
    metrics: list[dict[str, float]]
    adapter: dict[str, np.ndarray]


class Trl:
    """TRL's trainer and the start of all its runs."""

    def __init__(self, folder, policy, reference):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            import datasets
            from trl import DPOConfig, DPOTrainer

            datasets.disable_progress_bars()
            logging.getLogger("trl").setLevel(logging.ERROR)
            base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32)
            self.trainer = DPOTrainer(
                peft.PeftModel.from_pretrained(base, reference, is_trainable=True),  # kept as `ref` too
                args=DPOConfig(
                    str(folder / "trl"),
                    beta=BETA,
                    use_weighting=True,  # computes what that needs
                    max_length=256,
                    per_device_train_batch_size=BATCH,
                    gradient_checkpointing=False,
                    use_cpu=True,
                    bf16=False,
                    report_to="none",
                    disable_tqdm=True,
                ),
                train_dataset=datasets.Dataset.from_list(preference_rows(STEPS * BATCH)),
                processing_class=transformers.AutoTokenizer.from_pretrained(instruct_folder()),
            )
        self.model, self.start = self.trainer.model, load_file(policy / "adapter_model.safetensors")
        rows = self.trainer.train_dataset
        self.ids = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
        collate = self.trainer.data_collator
        self.batches = [collate([rows[n] for n in range(at, at + BATCH)]) for at in range(0, len(rows), BATCH)]

    def steps(self, settings: dict[str, Any]) -> Steps:
        trainer = self.trainer
        smoothing = [SMOOTHED[name] for name in settings["loss_types"] if name in SMOOTHED]
        for name, value in {**DEFAULTS, **({"label_smoothing": smoothing[0]} if smoothing else {}), **settings}.items():
            setattr(trainer, name, value)
        trainer._metrics["train"].clear()

        def loss_of(batch):
            loss = trainer._compute_loss(self.model, batch, False)
            return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}

        return torch_steps(self.model, self.start, self.batches, loss_of)


def torch_steps(model, start: dict[str, np.ndarray], batches: list, loss_of: Callable) -> Steps:
    peft.set_peft_model_state_dict(model, {name: torch.tensor(value) for name, value in start.items()})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, eps=EPSILON)
    losses, metrics = [], []
    for batch in batches:
        loss, found = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        metrics.append(found)
    tensors = peft.get_peft_model_state_dict(model, adapter_name="default")
    return Steps(losses, metrics, {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()})


class Ours:
    """The same start. The scores are compiled once for all losses, and so is their pullback to the adapters."""

    def __init__(self, folder, policy, reference, ids: list[tuple]):
        self.folder = folder
        base = load(instruct_folder())
        self.start = load_adapter(base, policy)
        self.reference = frozen_copy(load_adapter(base, reference))
        self.micros = self.micros_of(ids)
        self.optimizer = OptimizerConfig(
            learning_rate=RATE, lr_schedule="constant", weight_decay=0.01, epsilon=EPSILON, max_grad_norm=1.0
        ).build(STEPS)
        adapters, self.weights = eqx.partition(self.start, trainable_filter(self.start))
        self.adapters = adapters
        self.scores = jax.jit(self._scores)
        self.pull = jax.jit(self._pull)
        self.update = jax.jit(self._update)

    @staticmethod
    def micros_of(examples: list) -> list:
        layout = PartShape.of_pairs(micro_batches=1, rows=2, row_length=256, targets=256, pairs=4)
        tables = [table_of(MemoryExamples(examples[at : at + BATCH])) for at in range(0, len(examples), BATCH)]
        return [packed(table, layout).micro_batch(0) for table in tables]

    def _scores(self, adapters, micro) -> tuple[Scores, Scores]:
        model = eqx.combine(adapters, self.weights)
        per_token = {"per_token": True, "per_token_of_reference": True, "statistics": STATISTICS}
        return score_with_reference(model, self.reference, micro, **per_token)

    def _pull(self, adapters, micro, slopes):
        """From the loss's slopes by the policy's log-probs to those by the adapters."""
        _, pull = jax.vjp(lambda adapters: differentiable(self._scores(adapters, micro)[0]), adapters)
        return pull(slopes)[0]

    def _update(self, adapters, opt_state, gradients):
        updates, opt_state = self.optimizer.update(gradients, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    def _exported(self, model) -> dict[str, np.ndarray]:
        folder = self.folder / "ours"
        save_adapter(model, folder, base_model="base", config=LoraConfig(r=4, alpha=8.0), overwrite=True)
        return load_file(folder / "adapter_model.safetensors")

    def steps(self, loss: Loss, micros: list | None = None) -> Steps:
        adapters, opt_state = self.adapters, self.optimizer.init(self.adapters)
        losses, all_metrics = [], []
        for micro in self.micros if micros is None else micros:
            examples = micro.examples
            # Scores do not depend on columns, with which they would be compiled anew.
            micro = dataclasses.replace(micro, examples=dataclasses.replace(examples, columns={}))
            policy, reference = self.scores(adapters, micro)

            def total(sums, policy=policy, reference=reference, examples=examples):
                found = loss(with_differentiable(policy, sums), reference, examples)
                return found.loss.sum().scalar() / BATCH, found.metrics

            (value, metrics), slopes = jax.value_and_grad(total, has_aux=True)(differentiable(policy))
            adapters, opt_state = self.update(adapters, opt_state, self.pull(adapters, micro, slopes))
            losses.append(float(value))
            all_metrics.append({name: float(metric.value) for name, metric in metrics.items()})
        return Steps(losses, all_metrics, self._exported(eqx.combine(adapters, self.weights)))


def differentiable(scores: Scores):
    assert scores.per_token is not None
    return scores.log_probs, scores.per_token.log_probs


def with_differentiable(scores: Scores, sums) -> Scores:
    return eqx.tree_at(lambda scores: [scores.log_probs, scores.per_token.log_probs], scores, list(sums))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The threads of torch would wait for cores by spinning, and JAX needs these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(policy, reference): folders with adapters that differ by about a nat a response."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "gate_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(instruct_folder(), dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    folders = [tmp_path_factory.mktemp(name) for name in ("reference", "policy")]
    model.save_pretrained(str(folders[0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.005 * torch.randn_like(parameter))
    model.save_pretrained(str(folders[1]))
    return folders[1], folders[0]


@pytest.fixture(scope="module")
def trl(tmp_path_factory, adapters) -> Trl:
    return Trl(tmp_path_factory.mktemp("trl"), *adapters)


@pytest.fixture(scope="module")
def our(tmp_path_factory, adapters, trl) -> Ours:
    return Ours(tmp_path_factory.mktemp("ours"), *adapters, trl.ids)


def assert_same(ours: Steps, theirs: Steps, start: dict[str, np.ndarray], names: list[str]) -> None:
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=1e-4)
    for name in names:
        found, expected = ([step[name] for step in side.metrics] for side in (ours, theirs))
        # Log-probs are about -100 nats, where float32 resolves 1e-5.
        np.testing.assert_allclose(found, expected, rtol=1e-5 if "logps" in name else 0, atol=1e-4, err_msg=name)
    assert ours.adapter.keys() == theirs.adapter.keys()
    moved = apart = 0.0
    for name, tensor in theirs.adapter.items():
        distance = np.linalg.norm(ours.adapter[name] - tensor)
        assert distance < 5e-3 * np.linalg.norm(tensor), name
        moved += np.linalg.norm(tensor - start[name]) ** 2
        apart += distance**2
    assert apart**0.5 < 1e-3 * moved**0.5 and moved > 0


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_trl(trl, our, case):
    loss, settings = CASES[case]
    theirs, found = trl.steps(settings), our.steps(loss)
    # TRL logs beta times the log-ratio, whatever the loss makes of it. See tests/losses for the rewards of the others.
    logs_others = {"sigmoid_norm", "ipo", "sft"} & set(settings["loss_types"][:1]) or "f_divergence_type" in settings
    rewards = [] if logs_others else ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    assert_same(found, theirs, trl.start, [*rewards, "logps/chosen", "logps/rejected"])


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """A response in which every second token is the likeliest one, and the others the least likely."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for number in range(count):
            logits = model(input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, (logits.argmin() if number % 2 else logits.argmax()).reshape(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def test_metrics_of_tokens_are_those_of_trl(trl, our):
    peft.set_peft_model_state_dict(trl.model, {name: torch.tensor(value) for name, value in trl.start.items()})
    ids = [(prompt, greedy(trl.model, prompt, 6), rejected) for prompt, _, rejected in trl.ids[:BATCH]]
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), row, strict=True)) for row in ids]
    batch = trl.trainer.data_collator(rows)
    trl.trainer._metrics["train"].clear()
    with torch.no_grad():
        trl.trainer._compute_loss(trl.model, batch, False)
    theirs = {name: values[-1] for name, values in trl.trainer._metrics["train"].items()}
    [micro] = our.micros_of(ids)
    policy, _ = our.scores(our.adapters, micro)
    found = token_metrics.token_metrics(policy, micro.examples)
    for name in ("entropy", "mean_token_accuracy"):
        assert float(found[name].value) == pytest.approx(theirs[name], abs=1e-4)
    assert theirs["mean_token_accuracy"] == pytest.approx(0.5)
    is_response = np.asarray(micro.examples.is_response.array)
    log_probs, tokens = (np.asarray(x.array)[is_response] for x in (policy.log_probs, policy.tokens))
    chosen, rejected = (log_probs / tokens).reshape(-1, 2).mean(axis=0)
    assert float(found["logps/chosen_per_token"].value) == pytest.approx(chosen, rel=1e-5)
    assert float(found["logps/rejected_per_token"].value) == pytest.approx(rejected, rel=1e-5)


# TRL's CPOTrainer has SimPO, AlphaPO and CPO; its ORPOTrainer counts the prompt in the likelihood, so prompts have one
# token there, which nothing predicts.
EXPERIMENTAL: dict[str, tuple[Loss, str, dict]] = {
    "simpo": (ours("simpo", beta=2.0, gamma=0.7), "CPO", {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0}),
    "simpo, smoothed": (
        ours("simpo", beta=2.0, gamma=0.7, label_smoothing=0.1),
        "CPO",
        {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0, "label_smoothing": 0.1},
    ),
    "alphapo": (
        ours("alphapo", beta=2.0, gamma=0.7, alpha=0.3),
        "CPO",
        {"loss_type": "simpo", "simpo_gamma": 0.7, "beta": 2.0, "alpha": 0.3},
    ),
    "cpo": (ours("cpo", cpo_alpha=0.5), "CPO", {"loss_type": "sigmoid", "cpo_alpha": 0.5}),
    "orpo": (ours("orpo"), "ORPO", {}),
}


class Experimental:
    """TRL's experimental trainers, of which only the losses run: they tokenize in a way of their own."""

    def __init__(self, trl: Trl):
        self.trl = trl
        # The first token stands for the prompt.
        self.ids = [(prompt[:1], chosen, rejected) for prompt, chosen, rejected in trl.ids]

    def steps(self, trainer_name: str, settings: dict[str, Any]) -> Steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            from trl.experimental.cpo import CPOTrainer
            from trl.experimental.orpo import ORPOTrainer

        trainer = object.__new__({"CPO": CPOTrainer, "ORPO": ORPOTrainer}[trainer_name])
        accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
        vars(trainer).update(accelerator=accelerator, is_encoder_decoder=False, aux_loss_enabled=False)
        vars(trainer).update(pad_token_id=0, padding_value=0)
        vars(trainer).update({"beta": BETA, "label_smoothing": 0.0, "alpha": 0.0, "cpo_alpha": 0.0, **settings})
        batches = [self._batch(self.ids[at : at + BATCH]) for at in range(0, len(self.ids), BATCH)]
        model = self.trl.model
        return torch_steps(model, self.trl.start, batches, lambda batch: trainer.get_batch_loss_metrics(model, batch))

    def _batch(self, pairs: list[tuple]) -> dict[str, torch.Tensor]:
        made = {}
        for name, at in (("chosen", 1), ("rejected", 2)):
            rows = [torch.tensor(pair[0] + pair[at]) for pair in pairs]
            labels = [torch.tensor([-100] * len(pair[0]) + pair[at]) for pair in pairs]
            pad = torch.nn.utils.rnn.pad_sequence
            made[f"{name}_input_ids"] = pad(rows, batch_first=True, padding_value=0)
            made[f"{name}_labels"] = pad(labels, batch_first=True, padding_value=-100)
            made[f"{name}_attention_mask"] = pad([torch.ones_like(row) for row in rows], batch_first=True)
        return made


@pytest.fixture(scope="module")
def experimental(trl) -> Experimental:
    return Experimental(trl)


@pytest.mark.parametrize("case", EXPERIMENTAL)
def test_three_steps_without_a_reference_are_those_of_trl(trl, our, experimental, case):
    loss, trainer, settings = EXPERIMENTAL[case]
    theirs, found = experimental.steps(trainer, settings), our.steps(loss, our.micros_of(experimental.ids))
    rewards = ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
    # Their logps are per token, but those of cpo.
    assert_same(found, theirs, trl.start, [*rewards, *(["nll_loss"] if case in ("cpo", "orpo") else [])])


WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
OF_ANSWERS = {
    "kto": {"loss_type": "kto", "beta": 0.5},
    "kto, weighted": {"loss_type": "kto", "beta": 0.5, **WEIGHTS},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", **WEIGHTS},
}


class Answers:
    """TRL's trainer of single answers, of which only the loss runs. The answers to other prompts are those of ours."""

    def __init__(self, trl: Trl):
        self.trl = trl
        answers = [
            TokenizedExample(
                np.array(prompt, np.int32),
                (np.array(chosen if number % 3 else rejected, np.int32),),
                columns={"label": [float(number % 3 > 0)], "example_weight": 1.0},
            )
            for number, (prompt, chosen, rejected) in enumerate(trl.ids)
        ]
        self.examples = list(with_mismatched_answers(table_of(MemoryExamples(answers)), seed=1, longest=256))

    def steps(self, settings: dict[str, Any]) -> Steps:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            from trl import KTOTrainer
            from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

        model = self.trl.model
        trainer = object.__new__(KTOTrainer)
        accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, unwrap_model=lambda x: x)
        vars(trainer).update(accelerator=accelerator, model=model, ref_model=None, aux_loss_enabled=False)
        vars(trainer).update(args=SimpleNamespace(gradient_checkpointing_kwargs=None), precompute_ref_logps=False)
        vars(trainer).update(_total_train_tokens=0, _tp_size=1, calculate_KL=settings["loss_type"] == "kto")
        vars(trainer).update({"beta": BETA, "desirable_weight": 1.0, "undesirable_weight": 1.0, **settings})
        rows = [
            {
                "prompt_ids": example.prompt.tolist(),
                "completion_ids": example.responses[0].tolist(),
                "KL_completion_ids": example.responses[1].tolist(),
                "label": example.columns["label"][0] == 1.0,
            }
            for example in self.examples
        ]
        collate = DataCollatorForUnpairedPreference(pad_token_id=0)

        def loss_of(batch):
            trainer._metrics = {"train": defaultdict(list)}
            loss = trainer._compute_loss(model, batch, False)
            return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}

        batches = [collate(rows[at : at + BATCH]) for at in range(0, len(rows), BATCH)]
        return torch_steps(model, self.trl.start, batches, loss_of)


@pytest.fixture(scope="module")
def answers(trl) -> Answers:
    return Answers(trl)


@pytest.mark.parametrize("case", OF_ANSWERS)
def test_three_steps_with_single_answers_are_those_of_trl(trl, our, answers, case):
    settings = OF_ANSWERS[case]
    loss = ours(settings["loss_type"], **{name: value for name, value in settings.items() if name != "loss_type"})
    theirs, found = answers.steps(settings), our.steps(loss, our.micros_of(answers.examples))
    by_label = [f"{name}/{label}" for name in ("rewards", "logps") for label in ("chosen", "rejected")]
    assert_same(found, theirs, trl.start, ["kl", "rewards/margins", *by_label])
    if case == "kto":
        assert max(step["kl"] for step in theirs.metrics) > 0.01, "the KL takes part"
