"""The command that makes pairs: what it samples, scores, drops, writes and resumes."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import pytest
from tiny_pairs import moved
from tiny_runs import instruct_folder, run_config, training_metrics, write_rows

from lora_dpo_jax.generation import GenerationConfig
from lora_dpo_jax.huggingface.adapters import save_adapter
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.judging import candidates
from lora_dpo_jax.judging.interface import Judge, JudgeConfig, Verdict
from lora_dpo_jax.judging.pairing import PairingConfig
from lora_dpo_jax.judging.scorers import GivenScores, JudgeScorer, RewardScorer
from lora_dpo_jax.lora import LoraConfig, loraize
from lora_dpo_jax.main.pairs import PairsConfig, main
from lora_dpo_jax.main.train import main as train
from lora_dpo_jax.runs.assembly import load_data

PROMPTS = ["the owl?", [{"role": "system", "content": "quiet"}, {"role": "user", "content": "why?"}], "a cat near"]
LORA = LoraConfig(r=2, alpha=4.0, target_modules=["q_proj"])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = load_model(instruct_folder(), read_config(instruct_folder()), dtype="float32")
    model = moved(loraize(base, LORA, key=jax.random.key(0)), size=0.3)
    save_adapter(model, folder, base_model=str(instruct_folder()), config=LORA)
    return folder


def sampling(folder: Path, adapter: Path, prompts: list[Any], **settings: Any) -> PairsConfig:
    """Four samples of each prompt, in batches of two."""
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    given: dict[str, Any] = {
        "model": str(instruct_folder()),
        "prompts_file": str(folder / "prompts.jsonl"),
        "samples": 4,
        "generation": GenerationConfig(max_new_tokens=8, temperature=1.0, batch_size=2),
        "pairing": PairingConfig(keep_truncated=True, comparisons="all"),
        "scorer": RewardScorer(adapter=str(adapter), beta=1.0),
        "output": str(folder / "pairs.jsonl"),
    }
    return PairsConfig(**given | settings)


@pytest.fixture(scope="module")
def made(adapter, tmp_path_factory) -> tuple[PairsConfig, dict[str, float]]:
    """A command that has ended, with its numbers."""
    config = sampling(tmp_path_factory.mktemp("made"), adapter, [*PROMPTS, PROMPTS[0]])
    return config, main(config)


def lines(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def sampled_texts(config: PairsConfig) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in lines(config.kept["candidates_file"]):
        found.setdefault(json.dumps(line["prompt"]), []).append(line["completion"])
    return found


def test_each_row_prefers_the_completion_with_the_greater_reward(made):
    config, summary = made
    rows, texts = lines(config.output), sampled_texts(config)
    assert summary["prompts"] == 3 and summary["completions"] == summary["completions/sampled"] == 12
    assert summary["tokens"] == sum(line["tokens"] for line in lines(config.kept["candidates_file"])) > 12
    assert summary["rows"] == len(rows) == 18 and summary["tokens_per_second"] > 0
    for row in rows:
        prompt = row["prompt"][0]["content"] if len(row["prompt"]) == 1 else row["prompt"]
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert {chosen["content"], rejected["content"]} < {*texts[json.dumps(prompt)]}
        assert row["score_chosen"] > row["score_rejected"]
    mean = sum(row["score_chosen"] for row in rows) / len(rows)
    assert summary["score/chosen"] == pytest.approx(mean) and summary["score/rejected"] < mean


def test_training_reads_the_rows_and_takes_a_step_with_them(made, tmp_path):
    config, rows = made[0], lines(made[0].output)
    settings = {"train_batch_size": len(rows), "num_train_steps": 1}
    settings = {f"trainer__{name}": value for name, value in settings.items()}
    run = run_config(tmp_path, Path(config.output), lora__target_modules=["q_proj"], train_seq_len=64, **settings)
    data = load_data(run)
    assert len(data.pairs) == len(rows)
    for example, row in zip(data.pairs, rows, strict=True):
        for tokens, side in zip(example.responses, ("chosen", "rejected"), strict=True):
            whole = data.tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=False)
            assert [*example.prompt, *tokens] == whole
    train(run)
    (step,) = training_metrics(run)
    assert step["train/loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_killed_command_resumes_to_the_same_bytes_and_samples_nothing_twice(made, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "BATCHES_PER_CHUNK", 1)
    real, calls = candidates.generate, []

    def counted(model, prompts, *args, **kwargs):
        if len(calls) == most:
            raise KeyboardInterrupt
        calls.append(prompts)
        return real(model, prompts, *args, **kwargs)

    config, most = sampling(tmp_path, adapter, PROMPTS), 3
    monkeypatch.setattr(candidates, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        main(config)
    record = Path(config.kept["candidates_file"])
    assert not Path(config.output).exists() and len(lines(record)) == 6
    # The process had written only a part of the third chunk.
    record.write_bytes(record.read_bytes()[:-30])
    calls.clear()
    most = 6
    summary = main(config)
    assert len(calls) == 4 and summary["completions/sampled"] == 8  # the third chunk, and the three after it
    assert Path(config.output).read_bytes() == Path(made[0].output).read_bytes()
    assert record.read_bytes() == Path(made[0].kept["candidates_file"]).read_bytes()
    calls.clear()
    assert main(config)["completions/sampled"] == 0 and not calls
    assert Path(config.output).read_bytes() == Path(made[0].output).read_bytes()


def test_samples_depend_on_no_other_prompt_but_on_the_seed(made, adapter, tmp_path):
    config = sampling(tmp_path, adapter, ["new", PROMPTS[2]])
    main(config)
    name = json.dumps(PROMPTS[2])
    assert sampled_texts(config)[name] == sampled_texts(made[0])[name]
    assert len({*sampled_texts(config)[name]}) == 4
    other = dataclasses.replace(config, generation=dataclasses.replace(config.generation, seed=1))
    main(other)
    assert sampled_texts(config)[name][:4] != sampled_texts(other)[name][4:]


def test_a_file_of_completions_is_scored_by_an_adapter_as_samples_are(made, adapter, tmp_path):
    scorer = RewardScorer(adapter=str(adapter), beta=1.0, base=str(instruct_folder()))
    config = PairsConfig(
        completions_file=made[0].kept["candidates_file"],
        scorer=scorer,
        generation=made[0].generation,
        pairing=made[0].pairing,
        output=str(tmp_path / "again.jsonl"),
    )
    assert main(config)["completions/sampled"] == 0
    assert lines(config.output) == lines(made[0].output)


GIVEN = [
    {"prompt": "a", "completion": "good", "score": 2},
    {"prompt": "b", "completion": "alone", "score": 1},
    {"prompt": "a", "completion": "bad", "score": -1.5},
    {"prompt": "a", "completion": " ", "score": 9},
    {"prompt": "a", "completion": "cut", "score": 8, "is_finished": False},
    {"prompt": "a", "completion": "good", "score": 7},
    {"prompt": "a", "completion": "fair", "score": 1.75},
    {"prompt": "c", "completion": "x", "score": 3},
    {"prompt": "c", "completion": "y", "score": 3},
]


def given(tmp_path: Path, rows: list[dict[str, Any]] = GIVEN, **settings: Any) -> PairsConfig:
    file = write_rows(tmp_path / "completions.jsonl", rows)
    defaults: dict[str, Any] = {"scorer": GivenScores(), "output": str(tmp_path / "rows.jsonl")}
    return PairsConfig(completions_file=str(file), **defaults | settings)


def test_given_scores_make_pairs_and_each_reason_to_drop_is_counted(tmp_path, capsys):
    settings = PairingConfig(comparisons="all", min_margin=0.5)
    summary = main(given(tmp_path, pairing=settings, chat=False))
    dropped = {name.removeprefix("dropped/"): count for name, count in summary.items() if "dropped" in name and count}
    reasons = ("empty", "truncated", "same_text", "small_margin", "same_score", "too_few", "no_row")
    assert dropped == dict.fromkeys(reasons, 1)
    rows = lines(tmp_path / "rows.jsonl")
    assert {row["prompt"] for row in rows} == {"a"}
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("good", "bad"), ("fair", "bad")]
    assert (rows[0]["score_chosen"], rows[0]["score_rejected"]) == (2, -1.5)
    printed = capsys.readouterr().out
    assert "1 no end within max_new_tokens" in printed and "1 fewer than two completions left" in printed


def test_ranked_rows_hold_all_completions_with_their_scores(tmp_path):
    main(given(tmp_path, pairing=PairingConfig(rows="ranked"), chat_template_kwargs={"kind": 1}))
    (row,) = lines(tmp_path / "rows.jsonl")
    assert row == {
        "prompt": [{"role": "user", "content": "a"}],
        "responses": [[{"role": "assistant", "content": text}] for text in ("good", "bad", "fair")],
        "scores": [2.0, -1.5, 1.75],
        "chat_template_kwargs": {"kind": 1},
    }


@dataclasses.dataclass(frozen=True)
class Longer(JudgeConfig):
    """Prefers the longer answer, or always the first one; gives up after some questions."""

    always_first: bool = False
    most: int = 1000
    asked: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def start(self, run):
        config = self

        class Started(Judge):
            @property
            def identity(self):
                return {"type": "longer", "always_first": config.always_first}

            def verdicts(self, questions):
                for number, question in enumerate(questions):
                    if number == config.most:
                        raise ConnectionError("the server is gone")
                    config.asked.append((question.first, question.second))
                    is_first = config.always_first or len(question.first) > len(question.second)
                    yield number, Verdict("first" if is_first else "second")

        return Started()


def test_a_judge_is_asked_about_each_two_in_both_orders_and_never_twice(tmp_path, capsys):
    completions = ["a long answer", "short", "not so long", "short"]
    rows = [{"prompt": prompt, "completion": text} for prompt in "pq" for text in completions]
    gone, whole = Longer(most=5), Longer()
    config = given(tmp_path, rows, scorer=JudgeScorer(gone))
    with pytest.raises(ConnectionError):
        main(config)
    assert not Path(config.output).exists()
    summary = main(dataclasses.replace(config, scorer=JudgeScorer(whole)))
    assert (summary["verdicts/asked"], summary["verdicts/known"], summary["verdicts/inconsistent"]) == (7, 5, 0)
    assert len(gone.asked + whole.asked) == 12 and Counter(gone.asked + whole.asked).most_common(1)[0][1] == 2
    found = [
        (*row["chosen"], *row["rejected"], row["score_chosen"], row["score_rejected"]) for row in lines(config.output)
    ]
    turns = [{"role": "assistant", "content": text} for text in ("a long answer", "short")]
    assert found == [(*turns, 1.0, 0.0)] * 2
    assert "7 asked, 5 known before; the two orders disagree in 0.0%" in capsys.readouterr().out


def test_a_judge_that_always_prefers_the_first_answer_makes_no_pair(tmp_path, capsys):
    rows = [{"prompt": "p", "completion": text} for text in ("one", "two", "three")]
    config = given(
        tmp_path, rows, scorer=JudgeScorer(Longer(always_first=True)), pairing=PairingConfig(comparisons="all")
    )
    with pytest.raises(ValueError, match="no row is left"):
        main(config)
    printed = capsys.readouterr().out
    assert "the two orders disagree in 100.0%" in printed and "3 the judge's two orders disagree" in printed


def test_nothing_is_written_where_no_row_is_left(tmp_path):
    with pytest.raises(ValueError, match="no row is left to write to output="):
        main(given(tmp_path, GIVEN[-2:]))
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize(
    "row, says",
    [
        ({"completion": "x", "score": 1}, "row 2: needs `prompt`"),
        ({"prompt": "a", "score": 1}, "row 2: needs `completion`"),
        (
            {"prompt": "a", "completion": "x"},
            "row 2: needs a finite number in the column that scorer.field=score names",
        ),
        ({"prompt": "a", "completion": "x", "score": float("nan")}, "row 2: needs a finite number"),
        ({"prompt": "a", "completion": "x", "score": 1, "is_finished": "no"}, "row 2: .*`is_finished`"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, says):
    with pytest.raises(ValueError, match=says):
        main(given(tmp_path, [GIVEN[0], row]))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"model": None}, "give model, which completes the prompts, or completions_file"),
        ({"prompts_file": None}, "set prompts_file"),
        ({"samples": 1}, "samples=1 must be at least 2"),
        ({"generation": GenerationConfig()}, "generation.temperature=0 would give 4 equal completions"),
        ({"scorer": GivenScores()}, "scorer.type=given reads the scores of completions_file"),
        ({"output": "gs://b/p.jsonl"}, "set candidates_file to a file of this machine"),
        ({"candidates_file": "gs://b/c.jsonl"}, "candidates_file='gs://b/c.jsonl' must be a file of this machine"),
        ({"output": "p.jsonl", "candidates_file": "./p.jsonl"}, "candidates_file and output are both 'p.jsonl'"),
        ({"model": None, "completions_file": "c.jsonl"}, "prompts_file and candidates_file are for completions of a"),
        ({"completions_file": "c.jsonl"}, "completions_file and model exclude each other"),
        ({"chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs may not set"),
        (
            {"model": None, "prompts_file": None, "completions_file": "c.jsonl"},
            "scorer.base is not set: without model",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        sampling(tmp_path, tmp_path, PROMPTS, **settings)


def test_no_other_file_is_replaced(tmp_path, adapter):
    (tmp_path / "rows.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(FileExistsError, match="output=.* is not what this command writes"):
        main(given(tmp_path))
    config = sampling(tmp_path, adapter, PROMPTS, candidates_file=str(tmp_path / "rows.jsonl"))
    with pytest.raises(FileExistsError, match="candidates_file=.* is not what this command writes"):
        main(config)
    with pytest.raises(FileExistsError, match="would replace a file of prompts_file"):
        main(dataclasses.replace(config, output=config.prompts_file))
    record = tmp_path / "record.jsonl"
    whole = json.dumps(dict.fromkeys(candidates.LINE, "x")) + "\n"
    for text, line in ((whole + "{}\n", 2), (whole + "no\n", 2), ('{"key": 1', None), ("mine", 1), (f"{whole}mine", 2)):
        record.write_text(text)
        if line is None:
            candidates.Record(record, candidates.LINE).__exit__()
            assert record.read_text() == ""
        else:
            with pytest.raises(ValueError, match=f"record.jsonl, line {line}: is not what this command writes"):
                candidates.Record(record, candidates.LINE)


def test_one_command_at_a_time_writes_a_record(tmp_path):
    path = tmp_path / "record.jsonl"
    with candidates.Record(path, candidates.LINE):
        with pytest.raises(OSError, match="is open in another process"):
            candidates.Record(path, candidates.LINE)
    candidates.Record(path, candidates.LINE).__exit__()


def test_the_prompts_of_rows_of_pairs_are_taken(tmp_path):
    from lora_dpo_jax.runs.prompts import file_prompts

    turns = [{"role": "user", "content": "Why?"}]
    row = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    file = write_rows(tmp_path / "pairs.jsonl", [row, {"prompt": "Who?", "chosen": "a", "rejected": "b"}])
    assert [prompt.content for prompt in file_prompts(str(file))] == [turns, "Who?"]
    assert Counter(prompt.key for prompt in file_prompts(str(file))) == {'"Why?"': 1, '"Who?"': 1}
