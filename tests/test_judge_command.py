"""`python -m lora_dpo_jax.main.judge`: from a run's config to the rates, against a server of the tests and offline."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from judge_servers import Reply, judge_server
from tiny_runs import instruct_folder, preference_rows, run_config, write_rows

from lora_dpo_jax.huggingface.adapters import save_adapter
from lora_dpo_jax.huggingface.weights import load_model, read_config
from lora_dpo_jax.judging.openai_judge import OpenAIJudgeConfig
from lora_dpo_jax.judging.reward_judge import RewardJudgeConfig
from lora_dpo_jax.lora import LoraConfig, loraize, trainable_filter
from lora_dpo_jax.main import generate
from lora_dpo_jax.main.judge import JudgingConfig, main
from lora_dpo_jax.runs import systems
from lora_dpo_jax.runs.assembly import load_data
from lora_dpo_jax.runs.systems import SystemConfig
from lora_dpo_jax.settings.arguments import parse

KEY = "sk-proj-0123456789abcdefghij"
PROMPTS = [f"Why {number}?" for number in range(6)]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", str(tmp_path / "cache"))


def completions(path, texts, prompts=PROMPTS) -> str:
    rows = [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]
    return str(write_rows(path, rows))


def files(tmp_path, candidate, baseline, **settings) -> JudgingConfig:
    """Two files of completions: no model, no data and no base are needed."""
    return JudgingConfig(
        **{
            "candidate": SystemConfig(completions_file=completions(tmp_path / "c.jsonl", candidate)),
            "baseline": SystemConfig(completions_file=completions(tmp_path / "b.jsonl", baseline)),
            "output": str(tmp_path / "out"),
            "judge": OpenAIJudgeConfig(model="m", base_url="http://127.0.0.1:1/v1"),
            **settings,
        }
    )


def asked(server, **settings) -> OpenAIJudgeConfig:
    return OpenAIJudgeConfig(model="m", base_url=server.url, **settings)


def answers_of(text: str) -> tuple[str, str]:
    """The two answers in a question of the default template."""
    first, _, rest = text.partition("[Answer of A]\n")[2].partition("\n\n[Answer of B]\n")
    return first, rest.partition("\n\n")[0]


def longer(text: str, number: int) -> Reply:
    first, second = answers_of(text)
    return Reply("Verdict: A" if len(first) > len(second) else "Verdict: B")


def test_a_judge_of_the_first_answer_has_no_win_rate_and_says_so(tmp_path, capsys):
    with judge_server(lambda text, number: Reply("I like it. Verdict: A")) as server:
        found = main(files(tmp_path, ["long"] * 6, ["x"] * 6, judge=asked(server)))
    assert found["rates"]["inconsistent"]["value"] == found["prefers_first"]["value"] == 1.0
    assert found["win_rate"]["value"] is None and found["length_controlled_win_rate"]["value"] is None
    printed = capsys.readouterr().out
    assert "win rate          undefined: the judge's two orders agree on no prompt" in printed
    assert "prefers first     100.0%   [100.0%, 100.0%]" in printed


def test_a_judge_of_length_has_its_whole_win_rate_and_no_length_controlled_one(tmp_path, capsys):
    candidate = ["a" * (number + 5) for number in range(6)]
    with judge_server(longer) as server:
        judge = asked(server, prompt_price=1e6, completion_price=2e6)
        found = main(files(tmp_path, candidate, ["x"] * 6, judge=judge))
        assert len(server.asked) == 12
    printed = capsys.readouterr().out
    assert "win rate          100.0%" in printed and "prefers first      50.0%" in printed
    assert "length-controlled undefined: every answer of the candidate is longer" in printed
    assert "120 read, 36 written; cost 192.0000" in printed

    out = tmp_path / "out"
    assert json.loads((out / "judge.json").read_text()) == found
    assert found["counts"] == {"win": 6, "loss": 0, "tie": 0, "inconsistent": 0, "unparsed": 0}
    assert (found["cost"], found["asked"], found["usage"]["prompt_tokens"]) == (192.0, 12, 120)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["candidate"], row["outcome"]) for row in results] == [
        (prompt, text, "win") for prompt, text in zip(PROMPTS, candidate, strict=True)
    ]
    assert results[0]["reasons"] == ["Verdict: A", "Verdict: B"]
    assert len((out / "verdicts.jsonl").read_text().splitlines()) == 12
    assert sorted(path.name for path in out.iterdir()) == ["judge.json", "results.jsonl", "verdicts.jsonl"]


def test_the_same_command_again_asks_nothing_and_finds_the_same(tmp_path, capsys):
    with judge_server(longer) as server:
        config = files(tmp_path, ["aaa"] * 6, ["b", "bbbb"] * 3, judge=asked(server))
        one, other = main(config), main(config)
        assert len(server.asked) == 12
    changing = ("seconds", "asked", "from_file", "usage_now", "completion_seconds")
    assert {name: one[name] for name in one if name not in changing} == {
        name: other[name] for name in other if name not in changing
    }
    assert (one["asked"], other["asked"], other["from_file"]) == (12, 0, 12)
    assert "0 asked, 12 known before" in capsys.readouterr().out


def test_no_key_is_written_or_printed(tmp_path, capsys, caplog):
    with judge_server(lambda text, number: Reply(f"Your key is {KEY}. Verdict: A")) as server:
        main(files(tmp_path, ["a"] * 6, ["b"] * 6, judge=asked(server, parameters={"user": KEY})))
        assert server.keys[0] == f"Bearer {KEY}"
    with judge_server(lambda text, number: Reply(status=401, message=KEY)) as server:
        with pytest.raises(ConnectionError, match=r"rejects the key in this environment variable \(401\)$") as raised:
            main(files(tmp_path, ["a"] * 6, ["b"] * 6, judge=asked(server), output=str(tmp_path / "other")))
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) >= 6
    assert not [text for text in [*texts, *capsys.readouterr(), caplog.text, str(raised.value)] if KEY in text]


def test_an_error_says_what_is_kept(tmp_path):
    def reply(text: str, number: int) -> Reply:
        return Reply(status=400, message="no") if "Why 5" in text else longer(text, number)

    with judge_server(reply) as server:
        with pytest.raises(ValueError, match=r"\(400: no\)\. 10 verdicts are kept in .*verdicts.jsonl; the same comm"):
            main(files(tmp_path, ["aa"] * 6, ["b"] * 6, judge=asked(server, concurrency=1)))


def test_ctrl_c_ends_at_once_and_says_what_is_kept(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_dpo_jax.main.judge.compare", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(files(tmp_path, ["a"] * 6, ["b"] * 6))
    assert ended.value.code == 130 and "stopped: 0 verdicts are kept in " in capsys.readouterr().err


def test_prompts_are_drawn_by_the_seed(tmp_path):
    def drawn(folder: str, **settings) -> set[str]:
        with judge_server(longer) as server:
            config = files(tmp_path, ["aa"] * 6, ["b"] * 6, judge=asked(server), count=3, **settings)
            main(dataclasses.replace(config, output=str(tmp_path / folder)))
            return {text.partition("[Request]\n")[2].partition("\n")[0] for text in server.asked}

    first = drawn("one")
    assert len(first) == 3 and drawn("two") == first
    assert any(drawn(f"seed {seed}", seed=seed) != first for seed in (1, 2))


# Against models


ROWS = [*preference_rows(12), preference_rows(1)[0] | {"rejected": [{"role": "assistant", "content": "no"}]}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that changes the model, as a run exports it."""
    folder, config = tmp_path_factory.mktemp("run") / "adapter", LoraConfig(r=2, alpha=4.0)
    base = load_model(instruct_folder(), read_config(instruct_folder()), dtype=jnp.float32)
    model = loraize(base, config, key=jax.random.key(0))
    model = jax.tree.map(lambda x, trains: x + 0.05 if trains else x, model, trainable_filter(model))
    save_adapter(model, folder, base_model=str(instruct_folder()), config=config)
    return folder


def of_run(tmp_path, adapter, **settings) -> JudgingConfig:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    run = run_config(tmp_path, rows, validation_split_fraction=0.5, generation={"max_new_tokens": 6})
    given = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    given |= {"peft_save_path": str(adapter), "output": str(tmp_path / "out"), "judge": RewardJudgeConfig()}
    return JudgingConfig(**given | settings)


def test_a_run_is_judged_by_its_own_reward_on_its_held_out_prompts(tmp_path, adapter, monkeypatch, capsys):
    config = of_run(tmp_path, adapter)
    found = main(config)
    held_out = load_data(config).held_out
    numbers = sorted({int(held_out.origin(index).rpartition("row ")[2]) for index in range(len(held_out))})
    wanted = [ROWS[number - 1]["prompt"] for number in numbers if number <= 12]  # the last row has the first's prompt
    kept = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("candidate", "baseline")
    }
    assert len(wanted) > 3 and [row["prompt"] for row in kept["candidate"]] == wanted
    # The completions are those of `generate`.
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in wanted])
    options = {"max_new_tokens": 6, "dtype": "f32", "prompts_file": str(prompts), "model": str(instruct_folder())}
    for name, path in (("candidate", str(adapter)), ("baseline", None)):
        expected = generate.main(generate.GenerateConfig(adapter=path, **options))
        assert [row["completion"] for row in kept[name]] == expected
    assert kept["candidate"] != kept["baseline"]

    assert found["counts"]["inconsistent"] == 0 and found["prefers_first"]["value"] == 0.5
    assert found["judge"]["type"] == "reward" and found["judge"]["beta"] == 0.1
    # Again: nothing is completed or judged anew, and the weights are read once, by the judge.
    loads = []
    monkeypatch.setattr(systems, "load_model", lambda *args, **kw: loads.append(args) or load_model(*args, **kw))
    monkeypatch.setattr(systems, "generate", lambda *_, **__: pytest.fail("completed again"))
    assert main(config)["asked"] == 0 and len(loads) == 1
    # Another adapter at the same place is another system.
    (adapter / "adapter_config.json").write_text(
        json.dumps(json.loads((adapter / "adapter_config.json").read_text()) | {"lora_alpha": 8})
    )
    with pytest.raises(pytest.fail.Exception, match="completed again"):
        main(config)


BAD = {
    "no export": ({"peft_save_path": "gone/adapter"}, "candidate: the run has exported no adapter yet"),
    "no adapter": ({"peft_save_path": None}, "candidate is missing: set candidate.adapter"),
    "no base": ({"initialize_from_hf": ""}, "candidate is missing: set candidate.model"),
    "no held-out": ({"validation_split_fraction": 0.0}, "the run has no held-out prompts .validation_split_fraction"),
    "no prompts file": ({"prompts_file": "gone.txt"}, "prompts_file='gone.txt' is not a file"),
    "twice": ({"prompts_file": "TWICE"}, "line 3 is the same prompt as prompts_file=.*, line 1: leave one"),
    "not in file": ({"candidate": "FILE"}, r"candidate.completions_file=.* has no completion for \d of \d+ prompts; "),
    "empty file": ({"candidate": "EMPTY"}, "candidate.completions_file='.*' holds no completions"),
    "no file": ({"baseline": "gone.jsonl"}, "baseline.completions_file='gone.jsonl' is not a file"),
    "no completion": ({"baseline": "PROMPTS"}, "row 1: needs `completion`, a string; found"),
    "not an adapter": ({"candidate": SystemConfig(adapter=".")}, "candidate.adapter='.' is no PEFT adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_by_its_setting(tmp_path, adapter, monkeypatch, name):
    settings, says = BAD[name]
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "empty.jsonl").write_text("")
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    paths = {
        "TWICE": str(tmp_path / "twice.txt"),
        "FILE": completions(tmp_path / "c.jsonl", ["x"] * 6),
        "EMPTY": str(tmp_path / "empty.jsonl"),
        "PROMPTS": str(tmp_path / "prompts.jsonl"),
    }
    settings = {key: paths.get(value, value) if isinstance(value, str) else value for key, value in settings.items()}
    for key in {"candidate", "baseline"} & {*settings}:
        if isinstance(settings[key], str):
            settings[key] = SystemConfig(completions_file=settings[key])
    monkeypatch.setattr(systems, "load_model", lambda *_, **__: pytest.fail("the weights were read"))
    settings["judge"] = OpenAIJudgeConfig(model="m", base_url="http://127.0.0.1:1")
    with pytest.raises((OSError, ValueError), match=says):
        main(of_run(tmp_path, adapter, **settings))


def test_a_second_completion_of_a_prompt_is_refused(tmp_path):
    config = files(tmp_path, ["a"] * 6, ["b"] * 6, prompts_file=str(tmp_path / "p.txt"))
    (tmp_path / "p.txt").write_text("Why 0?")
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": [{"role": "user", "content": "Why 0?"}], "completion": "c"}))
    with pytest.raises(ValueError, match="row 7: is a second completion of the prompt of .*, row 1: leave"):
        main(config)


def test_a_system_against_itself_is_warned_of(tmp_path, caplog):
    config = files(tmp_path, ["a"] * 6, ["a"] * 6)
    found = main(config)
    assert "give the same answer to each prompt" in caplog.text and found["identical"] == 6
    assert found["win_rate"]["value"] == 0.5
    main(dataclasses.replace(config, baseline=config.candidate))
    assert "are the same system" in caplog.text


@pytest.mark.parametrize("name", ["judge.json", "results.jsonl", "verdicts.jsonl"])
def test_other_files_are_not_replaced(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"mine": 1}\n')
    with pytest.raises((OSError, ValueError), match=name):
        main(files(tmp_path, ["a"] * 6, ["b"] * 6))
    assert (tmp_path / "out" / name).read_text() == '{"mine": 1}\n'


def test_files_of_completions_are_not_replaced_where_they_are_inputs(tmp_path, adapter):
    (tmp_path / "out").mkdir()
    mine = completions(tmp_path / "out" / "candidate.jsonl", ["a"] * 6)
    config = of_run(tmp_path, adapter, baseline=SystemConfig(completions_file=mine))
    with pytest.raises(FileExistsError, match=r"would replace a file of baseline.completions_file"):
        main(config)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"output": None}, "output is missing"),
        ({"output": "gs://bucket/out"}, "output='gs://bucket/out' must be a folder of this machine"),
        ({"count": 0}, "count=0 must be at least 1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_settings_are_refused_by_name(tmp_path, settings, says):
    with pytest.raises(ValueError, match=says):
        files(tmp_path, ["a"] * 6, ["b"] * 6, **settings)
    with pytest.raises(ValueError, match="completions_file and adapter exclude each other"):
        SystemConfig(completions_file="a", adapter="b")


def test_a_runs_file_with_settings_of_the_judge_is_a_config(tmp_path):
    args = ["--judge.type", "openai", "--judge.model", "m", "--candidate.adapter", "A", "--output", "out"]
    config = parse(JudgingConfig, args, config_path="config/quickstart.yaml")
    assert config.systems["candidate"].adapter == "A" and config.judge == OpenAIJudgeConfig(model="m")
    assert config.systems["baseline"] == SystemConfig(model="examples/quickstart/model", quantization="none")
    assert config.models.adapter == "out/quickstart/adapter" and config.models.beta == 1.0
    with pytest.raises(ValueError, match="judge is missing; .* Choose who judges: --judge.type reward; or local"):
        parse(JudgingConfig, ["--output", "out"], config_path="config/quickstart.yaml")
