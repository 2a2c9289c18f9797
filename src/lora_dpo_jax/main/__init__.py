"""The commands: `python -m lora_dpo_jax.main` trains; `.evaluate`, `.generate` and `.plan` are beside it."""
