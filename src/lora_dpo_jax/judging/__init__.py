"""Judges of completions: which of two answers is better, or how good one is."""
