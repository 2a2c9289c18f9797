"""TRL's DPOTrainer with a PEFT adapter, on a CPU or one GPU. Environment: trl.

Batches are taken in the file's order and padded to their longest sequence, as TRL does. Gradient checkpointing is on
unless --no-gradient-checkpointing is given, as it is TRL's default.
"""

import tempfile
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.measure import host
from bench.peers.common import BETA, LEARNING_RATE, TARGETS, Benchmark, has_weights, parser

warnings.filterwarnings("ignore")


class TokenTrainer(DPOTrainer):
    """Takes token ids, in their order."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    def __init__(self, benchmark: Benchmark):
        self.benchmark, self.losses = benchmark, []

    def on_train_begin(self, *args, **kwargs):
        self.benchmark.meter.begin()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if state.global_step == self.benchmark.arguments.warmup:
                torch.cuda.reset_peak_memory_stats()
        self.benchmark.meter.end_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--no-gradient-checkpointing", action="store_true")
    arguments.add_argument("--precompute", action="store_true", help="the reference before the first step; not timed")
    a = arguments.parse_args()
    benchmark = Benchmark(a)
    clock = Clock(benchmark)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = TokenTrainer(
            model=load_model(a.model, getattr(torch, a.dtype)),
            args=config_of(a, benchmark, folder),
            train_dataset=Dataset.from_list(benchmark.pairs),
            processing_class=AutoTokenizer.from_pretrained(a.model),
            peft_config=LoraConfig(r=a.r, lora_alpha=a.alpha, target_modules=TARGETS, task_type="CAUSAL_LM"),
            callbacks=[clock],
        )
        trainer.train()
    on_gpu = torch.cuda.is_available()
    more = {"peak_memory_mb": round(torch.cuda.max_memory_allocated() / 2**20, 1)} if on_gpu else {}
    benchmark.report(
        "trl" + ("-nogc" if a.no_gradient_checkpointing else "") + ("-precomputed" if a.precompute else ""),
        losses=clock.losses,
        device=torch.cuda.get_device_name() if on_gpu else host(),
        packages=["trl", "peft", "transformers", "torch"],
        attention=trainer.model.config._attn_implementation,
        **more,
    )


def load_model(folder: str, dtype: torch.dtype):
    if has_weights(folder):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)


def config_of(a, benchmark: Benchmark, folder: str) -> DPOConfig:
    longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in benchmark.pairs)
    return DPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=a.dtype == "bfloat16",
        per_device_train_batch_size=a.pairs_per_step,
        max_steps=benchmark.num_steps,
        max_length=longest,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        beta=BETA,
        gradient_checkpointing=not a.no_gradient_checkpointing,
        precompute_ref_log_probs=a.precompute,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        remove_unused_columns=False,
    )


if __name__ == "__main__":
    main()
