"""Kills runs again and again until they are done, and compares them with one that was left in peace.

    python -m bench.interruptions --config_path config/quickstart.yaml --kills 20 --trainer.num_train_steps 24

Further arguments go to all runs. SIGKILL comes at any moment, or while a run tokenizes, computes the reference's
log-probs, makes a step, writes a checkpoint or exports a model, each in turn; what was on its way is read from what is
left behind. After each kill, every checkpoint, export and cache in its final place must be whole, and the same as that
of the run left in peace; in the end metrics, adapters and merged models must be the same too, bit for bit. Exits with
status 1 if not.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from etils import epath

from lora_dpo_jax.checkpoints.files import DESCRIPTION, check_files
from lora_dpo_jax.data.cache import TokenizedExamples
from lora_dpo_jax.huggingface.manifest import MANIFEST
from lora_dpo_jax.reference_cache import RECORD

MARKERS = ("config.json", "adapter_config.json")  # what makes a folder an export to its readers
# What to wait for, in the order in which a run comes there.
MOMENTS = ("tokenizing", "reference", "any", "checkpoint", "step", "export", "checkpoint", "any", "step", "export")
LOOK_SECONDS = 0.0005
LONGEST_DELAY = 0.03  # seconds between seeing what was waited for and the kill


class Run:
    """A run with a name and a folder of its own."""

    def __init__(self, work: Path, name: str, args: list[str]):
        self.folder, self.logs = work / name, work / name / "logs" / name
        self.cache = self.folder / "cache"
        places = {
            "trainer.id": name,
            "trainer.log_dir": self.logs.parent,
            "data.cache_dir": self.cache,
            "peft_save_path": self.folder / "adapter",
            "merged_hf_save_path": self.folder / "merged",
            # Compiled programs are shared: they are no part of what is tried.
            "trainer.jax_compilation_cache_dir": work / "programs",
        }
        self.command = [sys.executable, "-m", "lora_dpo_jax.main", *args]
        for setting, value in places.items():
            self.command += [f"--{setting}", str(value)]

    def start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = (self.folder / "log.txt").open("a")
        return subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def finish(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        if status := self.start().wait():
            sys.exit(f"{' '.join(self.command)}\nended with status {status}; see {self.folder / 'log.txt'}")
        return time.monotonic() - began

    def kill_at(self, moment: str, randomness: random.Random, seconds: float) -> str | None:
        """Starts it and kills it at a moment, within `seconds` if that is any. What it did then; None: it was done."""
        left, steps, records = set(self.on_its_way()), self.steps(), self.records()
        process, until = self.start(), time.monotonic() + randomness.uniform(0.0, seconds)
        steps_to_wait = randomness.randint(1, 4)
        while process.poll() is None:
            left &= set(self.on_its_way())  # a name that is gone may come again
            if moment == "any":
                is_there = time.monotonic() >= until
            elif moment == "step":
                is_there = self.steps() >= steps + steps_to_wait and not self.kinds(left)
            elif moment == "reference":
                is_there = self.records() > records
            else:
                is_there = moment in self.kinds(left)
            if is_there:
                time.sleep(0.0 if moment == "any" else randomness.uniform(0.0, LONGEST_DELAY))
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return self.was_at(left, steps, records)
            time.sleep(LOOK_SECONDS)
        if process.returncode:
            sys.exit(f"ended with status {process.returncode}; see {self.folder / 'log.txt'}")
        return None

    def was_at(self, left: set[Path], steps: int, records: int) -> str:
        """What the run was doing when it was killed, from what there is beside what there was before it started."""
        if kinds := self.kinds(left):
            return " and ".join(kinds)
        if self.steps() > steps:
            return "step"
        # A plan is there until all that it names is computed.
        if self.records() > records and list((self.cache / "reference").glob("*.plan")):
            return "reference"
        return "start or between"

    def on_its_way(self) -> list[Path]:
        """What has not got its final name yet."""
        folders = {self.cache / "pairs": ".building-*", self.logs / "checkpoints": "*.orbax-checkpoint-tmp*"}
        found = [path for folder, pattern in folders.items() for path in folder.glob(pattern)]
        exports = [self.folder, self.folder / "adapter", self.folder / "merged"]
        return found + [path for folder in exports for path in folder.glob(".tmp-*")]

    def kinds(self, left: set[Path]) -> list[str]:
        """Of what is on its way, but for what an earlier kill left."""
        kinds = set()
        for path in set(self.on_its_way()) - left:
            if path.name.startswith(".building-"):
                kinds.add("tokenizing")
            else:
                kinds.add("checkpoint" if "orbax-checkpoint-tmp" in path.name else "export")
        return sorted(kinds)

    def steps(self) -> int:
        """Of which metrics are logged."""
        path = self.logs / "metrics.jsonl"
        return path.read_text().count('"train/loss"') if path.exists() else 0

    def records(self) -> int:
        """Of the reference's log-probs."""
        return sum(path.stat().st_size // RECORD.itemsize for path in self.cache.glob("reference/*/records.bin"))

    def exports(self) -> dict[str, dict[str, bytes]]:
        """The files of each folder that a reader would take for an export."""
        found = {}
        for marker in (path for name in ("adapter", "merged") for path in (self.folder / name).rglob("*config.json")):
            folder = marker.parent.relative_to(self.folder)
            if marker.name in MARKERS and not any(part.startswith(".") for part in folder.parts):
                # The manifest names the run, and each run here has a name of its own.
                files = (path for path in marker.parent.iterdir() if path.is_file() and path.name != MANIFEST)
                found[str(folder)] = {path.name: path.read_bytes() for path in files}
        return found

    def caches(self) -> dict[str, dict[str, bytes]]:
        """The files of each folder of tokenized pairs, opened as a run opens it."""
        folders = [path for path in (self.cache / "pairs").glob("[0-9a-f]*") if TokenizedExamples(path)]
        return {path.name: {file.name: file.read_bytes() for file in path.iterdir()} for path in folders}

    def check_what_looks_whole(self, other: "Run") -> int:
        """Returns how many checkpoints, exports and caches are in their places; exits if one is not as in `other`."""
        count = 0
        for ours, theirs in ((self.exports(), other.exports()), (self.caches(), other.caches())):
            for name, files in ours.items():
                count += 1
                if files != theirs.get(name):
                    sys.exit(f"{self.folder}: {name} looks whole, but is not that of {other.folder}")
        for found in self.logs.rglob(DESCRIPTION):
            if found.parent.name.removeprefix("step-").isdigit():
                check_files(epath.Path(found.parent))
                count += 1
        return count

    def outcome(self) -> dict[str, object]:
        """All that must be the same, but for what the clock decides."""
        lines = [json.loads(line) for line in (self.logs / "metrics.jsonl").read_text().splitlines()]
        metrics = [{k: v for k, v in line.items() if "second" not in k and k != "train/mfu"} for line in lines]
        return {"metrics.jsonl": [line for line in metrics if len(line) > 1], **self.exports()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, help="a new folder for all that is written; a temporary one if not given")
    options, args = parser.parse_known_args()
    work = (options.work or Path(tempfile.mkdtemp(prefix="interruptions_"))).absolute()
    Run(work, "compiles", args).finish()  # so that the next ones need not, and moments fall into all that a run does
    whole = Run(work, "whole", args)
    seconds = whole.finish()
    print(f"left in peace: {seconds:.0f} s, {whole.steps()} steps logged; all is in {work}", flush=True)

    randomness, counts, rounds = random.Random(options.seed), Counter(), 0
    while counts.total() < options.kills:
        rounds += 1
        killed = Run(work, f"killed-{rounds}", args)
        for moment in MOMENTS[: options.kills - counts.total()]:
            was_at = killed.kill_at(moment, randomness, seconds)
            if was_at is None:
                break
            counts[was_at] += 1
            count = killed.check_what_looks_whole(whole)
            told = f"run {rounds}, waited for {moment}, killed at: {was_at}; {killed.steps()} steps logged"
            print(f"{counts.total():3} {told}; {count} whole things", flush=True)
        killed.finish()
        compare(whole.outcome(), killed.outcome(), f"run {rounds}")
    print(f"{counts.total()} kills at: " + ", ".join(f"{what} {count}" for what, count in counts.most_common()))


def compare(theirs: dict[str, object], ours: dict[str, object], name: str) -> None:
    different = [what for what in dict.fromkeys([*theirs, *ours]) if theirs.get(what) != ours.get(what)]
    if different:
        sys.exit(f"{name} ended with another {' and '.join(different)}")
    print(f"    {name} ended with the same {len(theirs)} results, bit for bit: {', '.join(theirs)}", flush=True)


if __name__ == "__main__":
    main()
