"""python -m lora_dpo_jax.main --config_path config/quickstart.yaml"""

from lora_dpo_jax.main.command import command, process_start
from lora_dpo_jax.runs.config import TrainConfig
from lora_dpo_jax.settings.arguments import parse_arguments


def run() -> None:
    """The command `lora-dpo`."""
    with command(lambda: parse_arguments(TrainConfig), lambda config: config.trainer.distributed) as config:
        from lora_dpo_jax.main.train import main  # slow to import, and of no use for --help or after a mistake

        main(config, began=process_start())


if __name__ == "__main__":
    run()
