#!/usr/bin/env bash
# datasets 5.2.0: a Json column that mixes texts with other values keeps a text that is JSON by itself without quotes.
# Seen: the texts "42", "null" and '{"a": 1}' come back as 42, None and {'a': 1}; "plain" stays a text.
# A message whose content is text in some rows and a list of parts in others is such a column: an answer "42" is a number.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import datasets

given = ["plain", [{"type": "text", "text": "a part"}], "42", "null", '{"a": 1}']
table = datasets.Dataset.from_list([{"content": value} for value in given], on_mixed_types="use_json")
print("datasets", datasets.__version__, table.features)
read = [row["content"] for row in table]
for before, after in zip(given, read, strict=True):
    print(repr(before), "->", repr(after))
assert read[:2] == given[:2], "plain texts or lists are changed too"
assert read[2:] == [42, None, {"a": 1}], "texts that are JSON stay texts now"
PYTHON
