"""Judgements of completions: verdicts on two of them and their rates, rewards, and pairs from either."""
