#!/usr/bin/env bash
# draccus 0.11.6: a section of a config that is given in part loses the default of the field that holds it.
# Seen: `generation` is Generation(max_new_tokens=64) by its default_factory; with temperature given in the file, the other
# setting becomes the class's own 128. On the command line, `--generation.temperature 1` does the same.
# And draccus.dump sorts mappings, so that a config whose components have an order comes back in another one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet draccus==0.11.6
cd "$folder"
cat >run.py <<'PYTHON'
from dataclasses import dataclass, field
from importlib.metadata import version

import draccus


@dataclass
class Generation:
    max_new_tokens: int = 128
    temperature: float = 0.0


@dataclass
class Run:
    generation: Generation = field(default_factory=lambda: Generation(max_new_tokens=64))
    parts: dict[str, int] = field(default_factory=dict)


print("draccus", version("draccus"))
untouched = draccus.decode(Run, {})
in_part = draccus.decode(Run, {"generation": {"temperature": 1.0}})
by_command = draccus.parse(Run, args=["--generation.temperature", "1.0"])
dumped = draccus.dump(Run(parts={"z": 1, "a": 2}))
print(untouched, in_part, by_command, dumped, sep="\n")
assert untouched.generation.max_new_tokens == 64
assert in_part.generation.max_new_tokens == 128, "a section given in part keeps the field's default now"
assert by_command.generation.max_new_tokens == 128, "on the command line it does"
assert dumped.index("a: 2") < dumped.index("z: 1"), "dump keeps the order now"
PYTHON
"$folder/venv/bin/python" run.py
