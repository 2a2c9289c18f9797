"""Pairs of one's own: several completions of each prompt, scored, and written as rows that training reads.

python -m lora_dpo_jax.main.pairs --model <folder or hub id> [--adapter <PEFT folder>] --prompts_file prompts.jsonl \
    --scorer.adapter <PEFT folder> --output pairs.jsonl
"""

import itertools
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lora_dpo_jax.data.config import read_template
from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.generation import GenerationConfig
from lora_dpo_jax.judging import candidates
from lora_dpo_jax.judging.candidates import Sampled
from lora_dpo_jax.judging.interface import RunModels, Usage
from lora_dpo_jax.judging.pairing import REASONS, Completion, PairingConfig, pair, usable, win_shares
from lora_dpo_jax.judging.record import Record
from lora_dpo_jax.judging.rewards import DEFAULT_ROWS, ImplicitReward
from lora_dpo_jax.judging.scorers import GivenScores, JudgeScorer, RewardScorer, ScorerConfig
from lora_dpo_jax.judging.tournament import Tournament, number_of_questions, play
from lora_dpo_jax.judging.verdict_file import VerdictFile
from lora_dpo_jax.main.command import command
from lora_dpo_jax.main.generate import TAKEN
from lora_dpo_jax.main.output_file import check_output, write_output
from lora_dpo_jax.places import is_url, refuse_impossible_paths, same_place
from lora_dpo_jax.printable import printable
from lora_dpo_jax.processes.start import DistributedConfig
from lora_dpo_jax.redaction import log_to_stderr
from lora_dpo_jax.runs.prompts import Prompt, file_prompts
from lora_dpo_jax.runs.systems import ModelSystems, SystemConfig
from lora_dpo_jax.settings.arguments import parse
from lora_dpo_jax.settings.choices import check_choices

logger = logging.getLogger("lora_dpo_jax")

WRITTEN = ("output", "candidates_file", "verdicts_file")  # settings that name files to write
ADAPTER, REWARD = "adapter", "scorer.adapter"  # settings
PAIR = ("prompt", "chosen", "rejected", "score_chosen", "score_rejected")
VERDICT = ("key", "prompt", "first", "second", "preferred", "reason", "prompt_tokens", "completion_tokens")
RANKED = ("prompt", "responses", "scores")
LINES = [(*row, *more) for row in (PAIR, RANKED) for more in ((), ("chat_template_kwargs",))]


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SystemConfig):
    """What completes the prompts, what scores the completions, and which rows they become.

    Inherits `model` and what belongs to it, or `completions_file`.
    """

    output: str  # the .jsonl to write
    # reward: an adapter's implicit reward. judge: verdicts on each two of a prompt. given: numbers of completions_file
    scorer: ScorerConfig
    # .txt: one a line; .jsonl: `prompt`, a string or a list of messages, or rows of pairs, whose prompts are taken
    prompts_file: str | None = None
    samples: int = 4  # completions of each prompt
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=512, temperature=1.0))
    pairing: PairingConfig = field(default_factory=PairingConfig)
    candidates_file: str | None = None  # where completions are kept as they come; null: beside `output`
    verdicts_file: str | None = None  # where verdicts of a judge are kept as they come; null: beside `output`
    chat: bool = True  # false: prompts that are strings do not go through the chat template
    chat_template: str | None = None  # instead of the tokenizer's own: a Jinja text, or the path of one
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # such as {enable_thinking: false}

    def __post_init__(self):
        super().__post_init__()
        check_choices(self)
        refuse_impossible_paths({name: getattr(self, name) for name in ("prompts_file", *WRITTEN)})
        if (self.model is None) == (self.completions_file is None):
            raise ValueError("nothing to pair: give model, which completes the prompts, or completions_file")
        if self.model is not None:
            self._check_sampling()
        elif self.prompts_file is not None or self.candidates_file is not None:
            raise ValueError(
                "prompts_file and candidates_file are for completions of a model, and completions_file holds prompts "
                "and completions: drop one of them"
            )
        elif isinstance(self.scorer, RewardScorer) and self.scorer.base is None:
            raise ValueError(
                "scorer.base is not set: without model, set it to the model that scorer.adapter was trained on"
            )
        self._check_written()
        if taken := sorted(TAKEN & set(self.chat_template_kwargs)):
            raise ValueError(f"chat_template_kwargs may not set {taken}: they are no variables of a template")

    def _check_sampling(self) -> None:
        if self.prompts_file is None:
            raise ValueError("nothing to complete: set prompts_file")
        if self.samples < 2:
            raise ValueError(f"samples={self.samples} must be at least 2: pairs compare completions of one prompt")
        if self.generation.temperature == 0.0:
            raise ValueError(
                f"generation.temperature=0 would give {self.samples} equal completions: set it above 0, such as 1.0"
            )
        if isinstance(self.scorer, GivenScores):
            raise ValueError(
                "scorer.type=given reads the scores of completions_file, and model samples others: choose another one"
            )

    def _check_written(self) -> None:
        kept = self.kept
        for setting, path in kept.items():
            if getattr(self, setting) is None and is_url(self.output):
                raise ValueError(f"output={self.output!r} is a URL: set {setting} to a file of this machine")
            if is_url(path):
                raise ValueError(f"{setting}={path!r} must be a file of this machine")
        written = {"output": self.output, **kept}
        for (one, path), (other, same) in itertools.combinations(written.items(), 2):
            if same_place(path, same):
                raise ValueError(f"{other} and {one} are both {path!r}; they must differ")

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the chat template gets, and `chat_template` itself if it is set."""
        if self.chat_template is None:
            return self.chat_template_kwargs
        return {**self.chat_template_kwargs, "chat_template": read_template("chat_template", self.chat_template)}

    @property
    def kept(self) -> dict[str, str]:
        """The files that keep what is computed as it comes, by setting."""
        used = {"candidates_file": self.model is not None, "verdicts_file": isinstance(self.scorer, JudgeScorer)}
        path = Path(self.output).expanduser()
        beside = {name: path.with_name(f"{path.name.removesuffix('.jsonl')}.{name[:-5]}.jsonl") for name in used}
        return {name: getattr(self, name) or str(beside[name]) for name, is_used in used.items() if is_used}

    @property
    def models(self) -> RunModels:
        """What the settings of a judge stand for if they are null."""
        return RunModels(base=self.model, revision=self.revision, quantization=self.quantization or "none")


@dataclass
class Candidates:
    """The completions of each prompt, which are first found, then scored."""

    prompts: list[Prompt]
    completions: list[list[Completion]]  # of each prompt
    has_template: bool = True  # whether prompts that are strings are turns of a conversation
    sampled: Sampled = Sampled()
    tournament: Tournament | None = None  # if a judge compared them
    count: int = 0  # of completions, before any was dropped
    dropped: Counter[str] = field(default_factory=Counter)

    def drop_unusable(self, *, keep_truncated: bool) -> None:
        """Leaves out what is not to be scored."""
        self.count = sum(map(len, self.completions))
        for number, completions in enumerate(self.completions):
            kept, dropped = usable(completions, keep_truncated=keep_truncated)
            self.completions[number] = [completions[index] for index in kept]
            self.dropped += dropped

    @property
    def to_compare(self) -> tuple[list[Prompt], list[str]]:
        """(the prompt of each completion, the completions) of the prompts with more than one."""
        found = [
            (prompt, completion.text)
            for prompt, completions in zip(self.prompts, self.completions, strict=True)
            for completion in (completions if len(completions) > 1 else ())
        ]
        return [prompt for prompt, _ in found], [text for _, text in found]

    def take_scores(self, scores: Sequence[float]) -> None:
        """Those of the completions `to_compare`."""
        left = iter(scores)
        for number, completions in enumerate(self.completions):
            if len(completions) > 1:
                self.completions[number] = [replace(completion, score=next(left)) for completion in completions]


def main(config: PairsConfig) -> dict[str, float]:
    """Writes the rows, prints how many there are and what was left out, and returns the numbers by name."""
    if jax.process_count() > 1:
        raise ValueError(f"pairs takes one process; found {jax.process_count()}")
    _check_outputs(config)
    systems = _systems(config)  # before anything is computed, so that errors come early
    if isinstance(config.scorer, JudgeScorer):
        config.scorer.judge.check(config.models)
    found = _given(config) if config.completions_file is not None else _sampled(config, systems)
    if isinstance(config.scorer, RewardScorer):
        _take_rewards(config, config.scorer, found, systems)
    elif isinstance(config.scorer, JudgeScorer):
        _take_verdicts(config, config.scorer, found)
    rows = _rows(config, found)
    summary = _summary(found, rows)
    if rows:
        write_output(config.output, rows)
    _print(config, found, summary)
    if not rows:
        raise ValueError(f"no row is left to write to output={config.output!r}; see the counts above")
    return summary


def _check_outputs(config: PairsConfig) -> None:
    names = ("prompts_file", "completions_file", "chat_template")
    inputs = {name: [file] for name in names if (file := getattr(config, name))}
    check_output(config.output, lines=LINES, inputs=inputs)
    forms = {"candidates_file": candidates.LINE, "verdicts_file": VERDICT}
    for setting, path in config.kept.items():
        check_output(path, lines=[forms[setting]], inputs=inputs, setting=setting)


def _systems(config: PairsConfig) -> dict[str, ModelSystems]:
    """The models that sample and score, by the settings of their adapters. Those of one base share its weights."""
    scorer = config.scorer
    options: Any = {"dtype": config.dtype, "quantization": config.quantization or "none"}
    options["template_kwargs"] = config.template_kwargs
    adapters: dict[str, str | None] = {} if config.model is None else {ADAPTER: config.adapter}
    found: dict[str, ModelSystems] = {}
    if isinstance(scorer, RewardScorer):
        if scorer.base is None:
            adapters[REWARD] = scorer.adapter
        else:
            found[REWARD] = ModelSystems.find(("scorer.base", scorer.base), {REWARD: scorer.adapter}, **options)
    if config.model is not None:
        shared = ModelSystems.find(
            ("model", config.model),
            adapters,
            revision=config.revision,
            tokenizer=("tokenizer", config.tokenizer),
            **options,
        )
        found |= dict.fromkeys(adapters, shared)
    return found


def _given(config: PairsConfig) -> Candidates:
    """The completions of a file, with its scores if they are asked for."""
    score_field = config.scorer.field if isinstance(config.scorer, GivenScores) else None
    prompts, completions = candidates.given(str(config.completions_file), score_field, chat=config.chat)
    found = Candidates(prompts, completions, has_template=config.chat)
    found.drop_unusable(keep_truncated=config.pairing.keep_truncated)
    return found


def _sampled(config: PairsConfig, systems: dict[str, ModelSystems]) -> Candidates:
    """Completions of the model: recorded ones, and new ones of all others."""
    sampler, generation = systems.pop(ADAPTER), config.generation
    found = Candidates(_prompts(config), [], has_template=config.chat and not sampler.without_template)
    decided_by = {name: value for name, value in asdict(generation).items() if name != "batch_size"}
    identity = {
        "model": sampler.identities(cache_folder() / "digests")[ADAPTER],
        "stop_ids": sorted(sampler.stop_ids(ADAPTER)),
        "platform": jax.default_backend(),
        "generation": decided_by,
    }
    wanted = candidates.requests(sampler.encode(found.prompts)[ADAPTER], config.samples, identity)
    with Record(Path(config.kept["candidates_file"]), candidates.LINE) as record:
        if any(request.key not in record for request in wanted):
            found.sampled = candidates.sample(
                sampler.model(ADAPTER),
                sampler.tokenizers[ADAPTER],
                wanted,
                generation,
                record,
                stop_ids=sampler.stop_ids(ADAPTER),
                prompts=[prompt.content for prompt in found.prompts],
                progress=lambda chunks: tqdm(chunks, "sampling", unit=" chunks"),
            )
        found.completions = candidates.recorded(wanted, record)
    found.drop_unusable(keep_truncated=config.pairing.keep_truncated)
    return found


def _prompts(config: PairsConfig) -> list[Prompt]:
    """Each prompt of the file once, because nothing else decides its completions."""
    every = file_prompts(str(config.prompts_file), chat=config.chat)
    prompts: dict[str, Prompt] = {}
    for prompt in every:
        prompts.setdefault(prompt.key, prompt)
    if len(prompts) < len(every):
        logger.info("%d prompts of %s are there more than once", len(every) - len(prompts), config.prompts_file)
    return [*prompts.values()]


def _take_rewards(
    config: PairsConfig, scorer: RewardScorer, found: Candidates, systems: dict[str, ModelSystems]
) -> None:
    """Scores all completions that can be compared."""
    reward = ImplicitReward(
        systems[REWARD].model(REWARD),
        systems[REWARD].tokenizers[REWARD],
        scorer,
        template_kwargs=config.template_kwargs,
        rows=config.generation.batch_size or DEFAULT_ROWS,
    )

    def progress(batches, total: int):
        return tqdm(batches, "scoring", total=total, unit=" batches")

    found.take_scores(reward.score(*found.to_compare, progress=progress))


def _take_verdicts(config: PairsConfig, scorer: JudgeScorer, found: Candidates) -> None:
    """Has a judge compare each two completions of a prompt. Their scores are the shares of wins."""
    texts = [[completion.text for completion in completions] for completions in found.completions]
    count = number_of_questions(texts)
    logger.info("%s questions to the judge: each two completions of a prompt, in both orders", f"{count:,}")

    def progress(verdicts, total: int):
        return tqdm(verdicts, "judging", total=total, unit=" verdicts")

    judge = scorer.judge.start(config.models)
    with VerdictFile(Path(config.kept["verdicts_file"])) as file:
        found.tournament = play(judge, found.prompts, texts, file, progress=progress)
    for number, outcomes in enumerate(found.tournament.outcomes):
        shares = win_shares(len(texts[number]), outcomes)
        completions = zip(found.completions[number], shares, strict=True)
        found.completions[number] = [replace(completion, score=share) for completion, share in completions]


def _rows(config: PairsConfig, found: Candidates) -> list[dict[str, Any]]:
    """The rows of all prompts. Counts what they leave out."""
    rows = []
    for number, (prompt, completions) in enumerate(zip(found.prompts, found.completions, strict=True)):
        as_messages = not isinstance(prompt.content, str) or found.has_template
        outcomes = found.tournament and found.tournament.outcomes[number]
        pairing = pair(prompt.content, completions, config.pairing, as_messages=as_messages, outcomes=outcomes)
        # Training then renders the prompt as it was rendered here.
        kwargs = {"chat_template_kwargs": config.chat_template_kwargs} if config.chat_template_kwargs else {}
        rows += [{**row, **kwargs} for row in pairing.rows]
        found.dropped += pairing.dropped
    return rows


def _summary(found: Candidates, rows: list[dict[str, Any]]) -> dict[str, float]:
    sampled = found.sampled
    summary: dict[str, float] = {
        "prompts": len(found.prompts),
        "completions": found.count,
        "completions/sampled": sampled.completions,
        "tokens": sampled.tokens,
        "rows": len(rows),
        **{f"dropped/{reason}": found.dropped[reason] for reason in REASONS},
    }
    if sampled.completions:
        summary["tokens_per_second"] = sampled.tokens / sampled.seconds
    if played := found.tournament:
        of_verdicts = Counter(outcome for outcomes in played.outcomes for outcome in outcomes.values())
        summary |= {"verdicts/asked": played.asked, "verdicts/known": played.known}
        summary["verdicts/inconsistent"] = of_verdicts["inconsistent"] / max(of_verdicts.total(), 1)
    for name, ends in (("chosen", max), ("rejected", min)):
        of_rows = [row[f"score_{name}"] if "chosen" in row else ends(row["scores"]) for row in rows]
        if rows:
            summary[f"score/{name}"] = float(np.mean(of_rows))
    return summary


def _print(config: PairsConfig, found: Candidates, summary: dict[str, float]) -> None:
    sampled = found.sampled
    print(f"prompts      {len(found.prompts):,}")
    print(f"completions  {found.count:,}, {sampled.completions:,} of them sampled now", end="")
    if sampled.completions:
        speed = summary["tokens_per_second"]
        print(f": {sampled.tokens:,} tokens in {sampled.seconds:,.1f} s, {speed:,.0f} tokens per second", end="")
    print()
    if played := found.tournament:
        _print_verdicts(config, played, summary["verdicts/inconsistent"])
    for reason, what in REASONS.items():
        if count := found.dropped[reason]:
            print(f"dropped      {count:,} {what}")
    if summary["rows"]:
        best, worst = ("chosen", "rejected") if config.pairing.rows == "pairs" else ("best", "worst")
        print(f"mean score   {best} {summary['score/chosen']:.4f}, {worst} {summary['score/rejected']:.4f}")
        print(f"rows         {summary['rows']:,} {config.pairing.rows} in {printable(config.output)}")


def _print_verdicts(config: PairsConfig, played: Tournament, inconsistent: float) -> None:
    assert isinstance(config.scorer, JudgeScorer)
    usage, cost = played.usage, config.scorer.judge.cost(played.usage)
    print(f"verdicts     {played.asked:,} asked, {played.known:,} known before", end="")
    if usage != Usage():
        print(f"; {usage.prompt_tokens:,} tokens read and {usage.completion_tokens:,} written", end="")
    if cost is not None:
        print(f"; cost {cost:,.4f}", end="")
    print(f"; the two orders disagree in {inconsistent:.1%}")


def run() -> None:
    """The command `lora-dpo-pairs`."""
    log_to_stderr(logging.INFO)
    with command(lambda: parse(PairsConfig, sys.argv[1:]), lambda config: DistributedConfig()) as config:
        main(config)


if __name__ == "__main__":
    run()
