import json
import re

import huggingface_hub
import pytest
import yaml
from markdown_it import MarkdownIt

from lora_dpo_jax.huggingface.card import DataSource, Training, license_in, merged_card, model_card, public_name
from lora_dpo_jax.lora import LoraConfig

TRAINING = Training(
    loss="ipo",
    counts=(1234, 56),
    sources=[DataSource("mine", ["rows.jsonl"]), DataSource("theirs", ["org/set"], hub_id="org/set")],
    settings={"loss": {"type": "ipo", "beta": 0.1}, "lora": {"target_modules": None}},
    start="org/sft",
    scores={"after step 0": {"loss": 0.6931}, "after step 8": {"loss": 0.5, "odd|name": 1.0}},
    license={"license": "other", "license_name": "mine", "license_link": "https://mine"},
)


def parsed(card: str, tmp_path) -> huggingface_hub.ModelCard:
    """As the hub's client reads a file, whose checks are those of the hub."""
    path = tmp_path / "README.md"
    path.write_text(card, encoding="utf-8")
    read = huggingface_hub.ModelCard.load(path)
    assert read.data.to_dict() == huggingface_hub.metadata_load(path), "nothing is lost or renamed"
    return read


def test_the_card_of_an_adapter_says_what_a_reader_needs(tmp_path):
    config = LoraConfig(r=64, alpha=128.0, use_rslora=True)
    card = parsed(
        model_card(
            "org/base", config, ["q_proj"], {"kept": "step 8"}, revision="v1", training=TRAINING, repo="me/adapter"
        ),
        tmp_path,
    )
    data = card.data
    assert (data.base_model, data["base_model_relation"], data.library_name) == ("org/base", "adapter", "peft")
    assert (data.license, data.license_name, data.datasets) == ("other", "mine", ["org/set"])
    # What TRL 1.16 and PEFT 0.21 write for this run, and the name of this library.
    assert {"trl", "dpo", "lora", "transformers", "base_model:adapter:org/base"} < {*data.tags}
    for fact in (
        "# LoRA adapter for `org/base` at `v1`",
        "- rank 64, alpha 128, rank-stabilized scaling",
        "- kept: step 8",
        'PeftModel.from_pretrained(base, "me/adapter")',
        'from_pretrained("org/base", revision="v1")',
        "vllm serve org/base --revision v1 --enable-lora --max-lora-rank 64 --lora-modules dpo=me/adapter",
        "lora-dpo-generate --model org/base --adapter me/adapter",
        "| `loss` | 0.6931 | 0.5 |",
        "- `mine`: `rows.jsonl`",
        "[`org/set`](https://huggingface.co/datasets/org/set)",
        "1,234 pairs to train on, 56 held out.",
        "Continues the adapter `org/sft`.",
    ):
        assert fact in card.text


def test_the_code_of_a_card_is_code_and_its_settings_are_settings(tmp_path):
    text = model_card('org/it\'s "base"', LoraConfig(), ["q"], revision="a'b", training=TRAINING)
    python, settings = (re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)[0] for kind in ("python", "yaml"))
    compile(python, "card", "exec")
    assert yaml.safe_load(settings) == TRAINING.settings


def test_the_card_of_a_merged_model_says_that_it_is_one(tmp_path):
    card = parsed(merged_card("org/base", LoraConfig(r=4), training=TRAINING, repo="me/merged"), tmp_path)
    assert (card.data["base_model_relation"], card.data.library_name) == ("finetune", "transformers")
    assert "lora" not in card.data.tags and "base_model:finetune:org/base" in card.data.tags
    assert 'AutoModelForCausalLM.from_pretrained("me/merged")' in card.text and "rank 4" in card.text


@pytest.mark.parametrize(
    "base, shown, is_id",
    [
        ("org/base", "org/base", True),
        ("gpt2", "gpt2", True),
        ("/home/me/models/base", "base", False),
        ("file:///home/me/base/", "base", False),
        ("gs://b/c", "gs://b/c", False),
        ("https://me:pa55word@host/base?sig=abcdefgh1", "https://host/base", False),
    ],
)
def test_a_card_names_a_base_that_the_hub_knows_and_no_folder_of_this_machine(base, shown, is_id, tmp_path):
    """The hub rejects a card whose base_model is no id."""
    card = parsed(model_card(base, LoraConfig(), ["q_proj"]), tmp_path)
    assert card.data.base_model == (base if is_id else None)
    assert f"`{shown}`" in card.text and "/home/me" not in card.text and "pa55word" not in card.text
    assert public_name(base) == shown


@pytest.mark.parametrize(
    "name", ["`a``b`", "<script>x</script>", "a\n# b\n---\n", "a | b [c](d) *e* ~f~ $g$", "\x1b[2J"]
)
def test_markup_in_a_name_is_shown_and_not_obeyed(name, tmp_path):
    """Rendered as GitHub and the hub do, CommonMark with tables, each name is text and makes no other element."""
    markdown = MarkdownIt("commonmark").enable("table")
    training = Training(
        loss="ipo",
        sources=[DataSource(name, [name])],
        scores={name: {name: 1.0}},
        settings={"lora": {"target_modules": f"{name}```"}},
    )
    plain = Training(loss="ipo", sources=[DataSource("x", ["x"])], scores={"x": {"x": 1.0}}, settings={"lora": {}})

    def elements(card: str) -> list[str]:
        body = parsed(card, tmp_path).text
        tokens = [t for token in markdown.parse(body) for t in [token, *(token.children or [])]]
        assert not any(token.type in ("html_block", "html_inline") for token in tokens)
        return [token.type for token in tokens if token.type not in ("text", "text_special")]

    shown = model_card("base", LoraConfig(), ["x"], {name: name}, training=training)
    assert elements(shown) == elements(model_card("base", LoraConfig(), ["x"], {"x": "x"}, training=plain))
    assert "\x1b" not in shown


def test_the_same_run_writes_the_same_card():
    cards = {model_card("org/base", LoraConfig(), ["q"], {"a": "b"}, training=TRAINING) for _ in range(2)}
    assert len(cards) == 1
    assert not re.search(r"\b20\d\d-\d\d-\d\d|\d\d:\d\d", cards.pop()), "no date and no time"


@pytest.mark.parametrize(
    "card, found",
    [
        ("---\nlicense: mit\ntags: [x]\n---\n", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {}),
        ("---\nlicense: {\n---\n", {}),
        ("no metadata", {}),
        (None, {}),
    ],
)
def test_a_license_is_that_of_the_bases_card_if_it_states_one(card, found, tmp_path):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert found.items() <= license_in(tmp_path).items() and bool(found) == bool(license_in(tmp_path))
    assert json.dumps(license_in(tmp_path))
