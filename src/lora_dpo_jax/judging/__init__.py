"""Judgements of completions: rewards, and pairs from what was rewarded or judged."""
