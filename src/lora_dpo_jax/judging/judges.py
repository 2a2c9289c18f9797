"""The list of judges."""

from lora_dpo_jax.judging.interface import Judge, JudgeConfig
from lora_dpo_jax.judging.local_judge import LocalJudgeConfig
from lora_dpo_jax.judging.openai_judge import OpenAIJudgeConfig
from lora_dpo_jax.judging.reward_judge import RewardJudgeConfig

__all__ = ["Judge", "JudgeConfig", "LocalJudgeConfig", "OpenAIJudgeConfig", "RewardJudgeConfig"]
