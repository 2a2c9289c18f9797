"""The command line: `python -m lora_dpo_jax.main` trains; `.evaluate` and `.generate` beside it."""
