"""Every config file that is shipped or promised parses."""

from pathlib import Path

import draccus
import pytest

OBJECTIVES = Path(__file__).parents[1] / "config" / "objectives.yaml"  # changes of config files
CONFIG_FILES = sorted(path for path in OBJECTIVES.parent.glob("**/*.yaml") if path != OBJECTIVES)

# From Levanter's guide to LoRA-DPO; it must run as it stands but for its paths.
LEVANTER_CONFIG = """
data:
  tokenizer: marin-community/marin-tokenizer
  shuffle: true
  components:
    my_prefs:
      source: {type: url, train_urls: ["gs://path/to/preference/data/*.jsonl.gz"]}
      format: {type: preference_chat, slice_strategy: raise}
train_seq_len: 4096
trainer: {num_train_steps: 2000, train_batch_size: 128, mp: "p=f32,c=bfloat16"}
optimizer: {learning_rate: 5e-6, warmup: 0.1, lr_schedule: cosine, max_grad_norm: 1.0}
lora: {r: 64, alpha: 64.0, dropout: 0.0, zero_init_b: true, target_modules: null}
initialize_from_hf: meta-llama/Llama-3.1-8B
beta: 0.1
validation_split_fraction: 0.1
peft_save_path: gs://bucket/checkpoints/peft
merged_hf_save_path: gs://bucket/checkpoints/merged
hf_save_steps: 1000
"""


def parse(path: Path, args=()):
    from lora_dpo_jax.runs.config import TrainConfig

    return draccus.parse(config_class=TrainConfig, config_path=path, args=list(args))


def test_config_files_are_shipped():
    assert CONFIG_FILES


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_a_shipped_config_parses_and_begins_with_how_to_run_it(path):
    parse(path)
    first_line = path.read_text().splitlines()[0]
    assert first_line.startswith("# python -m lora_dpo_jax.main --config_path config/")
    assert path.name in first_line


def test_every_objective_has_settings_for_the_quickstarts_data():
    from bench import objectives
    from lora_dpo_jax.losses import LOSSES
    from lora_dpo_jax.runs.config import TrainConfig
    from lora_dpo_jax.settings import arguments

    chosen = objectives.settings()
    assert list(chosen) and set(chosen) == set(LOSSES)
    for name, different in chosen.items():
        assert isinstance(arguments.parse(TrainConfig, objectives.words(name, different)).loss, LOSSES[name])


@pytest.fixture
def levanter_config(tmp_path) -> Path:
    path = tmp_path / "levanter.yaml"
    path.write_text(LEVANTER_CONFIG)
    return path


def test_the_config_of_levanters_guide_parses(levanter_config):
    config = parse(levanter_config)
    assert config.train_seq_len == 4096
    assert config.trainer.train_batch_size == 128
    assert config.optimizer.warmup == 0.1
    assert config.lora.r == 64
    assert config.initialize_from_hf == "meta-llama/Llama-3.1-8B"
    assert config.validation_split_fraction == 0.1


def test_the_command_line_overrides_the_file(levanter_config):
    config = parse(levanter_config, ["--trainer.num_train_steps", "100", "--trainer.tracker", "[wandb, tensorboard]"])
    assert config.trainer.num_train_steps == 100
    assert [type(tracker).__name__ for tracker in config.trainer.tracker] == ["WandbConfig", "TensorboardConfig"]


def test_the_resolved_config_parses_to_itself(levanter_config, tmp_path):
    config = parse(levanter_config)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(draccus.dump(config))
    assert parse(resolved) == config


def test_an_unknown_key_is_an_error(tmp_path):
    path = tmp_path / "misspelt.yaml"
    path.write_text(LEVANTER_CONFIG.replace("max_grad_norm", "max_gradient_norm"))
    with pytest.raises(
        ValueError, match="optimizer.max_gradient_norm is no setting. The nearest: optimizer.max_grad_norm"
    ):
        parse(path)
