"""Judges of completions: which of two answers is better, or how good one is; and pairs from what they say."""
