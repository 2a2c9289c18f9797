"""python -m lora_dpo_jax.main --config_path config/quickstart.yaml"""

from lora_dpo_jax.main.errors import told_in_a_line
from lora_dpo_jax.main.setup import TrainConfig, parse_arguments, process_start
from lora_dpo_jax.main.train import main

if __name__ == "__main__":
    with told_in_a_line():
        main(parse_arguments(TrainConfig), began=process_start())
