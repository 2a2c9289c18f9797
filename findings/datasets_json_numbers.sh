#!/usr/bin/env bash
# datasets 5.2.0: a column of type Json is written with ten decimals and read through double precision.
# Seen: 0.12345678901234567 -> 0.123456789, 1.5e-15 -> 0.0, 123456789012345678901 -> another whole number.
# A preference row whose tool schema or score holds such a number is trained on with a different one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import datasets

given = [{"x": {"a": 0.12345678901234567}}, {"x": {"b": 1.5e-15}}, {"x": {"c": 123456789012345678901}}]
table = datasets.Dataset.from_list(given, on_mixed_types="use_json")
print("datasets", datasets.__version__, table.features)
read = [row["x"] for row in table]
for before, after in zip(given, read, strict=True):
    print(before["x"], "->", after)
assert "Json" in str(table.features), "the column is no longer of type Json"
assert read[0]["a"] != given[0]["x"]["a"] and abs(read[0]["a"] - 0.123456789) < 1e-9, "decimals are kept now"
assert read[1]["b"] == 0.0, "small numbers are kept now"
assert read[2]["c"] != given[2]["x"]["c"], "large whole numbers are kept now"
PYTHON
