"""Kills runs at random moments until they are done, and compares them with one that was left in peace.

    python -m bench.interruptions --config_path config/quickstart.yaml --kills 20 --trainer.num_train_steps 30

Further arguments go to all runs. SIGKILL comes at any moment: while modules are imported, caches are filled, steps are
made, checkpoints are written or models are exported. After each one, everything that looks whole must be whole; in the
end metrics, adapter and merged model must equal those of the other run, bit for bit. Exits with status 1 if not.
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
from pathlib import Path

from etils import epath
from safetensors import safe_open

from lora_dpo_jax.data.cache import TokenizedPairs
from lora_dpo_jax.training.checkpoint_files import DESCRIPTION, check_files

EXPORTS = {"adapter_config.json": "adapter_model*.safetensors", "config.json": "model*.safetensors"}


class Run:
    """A run with a name and a folder of its own."""

    def __init__(self, work: Path, name: str, args: list[str]):
        self.folder, self.logs = work / name, work / name / "logs" / name
        places = {
            "trainer.id": name,
            "trainer.log_dir": self.logs.parent,
            "data.cache_dir": self.folder / "cache",
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

    def kill_after(self, seconds: float) -> bool:
        """False if it was done before."""
        process = self.start()
        try:
            process.wait(seconds)
            return False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True

    def steps(self) -> int:
        """Of which metrics are logged."""
        path = self.logs / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return sum('"train/loss"' in line for line in lines)

    def check_what_looks_whole(self) -> int:
        """Reads each checkpoint, export and cache that a reader would take; returns how many. Raises if one is not."""
        count = 0
        for marker, tensors in EXPORTS.items():
            for found in self.folder.rglob(marker):
                if any(part.startswith(".") for part in found.parts):
                    continue  # of a name that no reader looks for
                files = list(found.parent.glob(tensors))
                assert files, f"{found.parent} has no tensors"
                for path in files:
                    with safe_open(path, "numpy") as file:
                        for name in file.keys():
                            file.get_tensor(name)
                count += 1
        for found in self.folder.rglob(DESCRIPTION):
            if found.parent.name.removeprefix("step-").isdigit():
                check_files(epath.Path(found.parent))
                count += 1
        for folder in (self.folder / "cache" / "pairs").glob("[0-9a-f]*"):
            TokenizedPairs(folder)
            count += 1
        return count

    def outcome(self) -> dict[str, object]:
        """All that must be the same, but for what the clock decides."""
        lines = [json.loads(line) for line in (self.logs / "metrics.jsonl").read_text().splitlines()]
        metrics = [{k: v for k, v in line.items() if "second" not in k and k != "train/mfu"} for line in lines]
        exports = {
            str(path.relative_to(self.folder)): path.read_bytes()
            for name in ("adapter", "merged")
            for path in sorted((self.folder / name).rglob("*.safetensors"))
        }
        return {"metrics.jsonl": [line for line in metrics if len(line) > 1], **exports}


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

    moments, kills, rounds = random.Random(options.seed), 0, 0
    while kills < options.kills:
        rounds += 1
        killed = Run(work, f"killed-{rounds}", args)
        while kills < options.kills and killed.kill_after(moment := moments.uniform(0.0, seconds)):
            kills += 1
            count = killed.check_what_looks_whole()
            told = f"run {rounds} killed after {moment:.1f} s, {killed.steps()} steps logged; {count} whole things"
            print(f"{kills:3} {told}", flush=True)
        killed.finish()
        compare(whole.outcome(), killed.outcome(), f"run {rounds}")


def compare(theirs: dict[str, object], ours: dict[str, object], name: str) -> None:
    different = [what for what in dict.fromkeys([*theirs, *ours]) if theirs.get(what) != ours.get(what)]
    if different:
        sys.exit(f"{name} ended with another {' and '.join(different)}")
    print(f"    {name} ended with the same {len(theirs)} results, bit for bit: {', '.join(theirs)}", flush=True)


if __name__ == "__main__":
    main()
