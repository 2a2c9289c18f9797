"""Other systems' LoRA-DPO, each run in an environment of its own; see environments.sh. They know nothing of ours."""
