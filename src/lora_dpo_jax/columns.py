"""Columns that formats of the data make, and that losses ask for by name."""

LABEL = "label"  # of each response of a single answer: one of the three numbers below
WEIGHT = "example_weight"  # of an example without comparisons
MARGIN = "target_margin"  # the difference of rewards that a pair should have

DESIRABLE, UNDESIRABLE, MISMATCHED = 1.0, 0.0, -1.0  # MISMATCHED: the answer to another prompt
