"""python -m lora_dpo_jax.main --config_path config/quickstart.yaml"""

from lora_dpo_jax.main.setup import TrainConfig, parse_arguments
from lora_dpo_jax.main.train import main

if __name__ == "__main__":
    main(parse_arguments(TrainConfig))
