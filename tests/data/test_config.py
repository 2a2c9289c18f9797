import re
from pathlib import Path

import draccus
import pytest
import yaml

from lora_dpo_jax.data.config import ComponentConfig, FormatConfig, PreferenceDataConfig
from lora_dpo_jax.data.sources import HubSource, UrlSource


def parsed(text):
    return draccus.decode(PreferenceDataConfig, yaml.safe_load(text))


def test_the_section_of_levanters_guide_parses():
    config = parsed("""
        tokenizer: marin-community/marin-tokenizer
        shuffle: true
        components:
          my_prefs:
            source: {type: url, train_urls: ["gs://path/to/preference/data/*.jsonl.gz"]}
            format: {type: preference_chat, slice_strategy: raise}
    """)
    assert config.tokenizer == "marin-community/marin-tokenizer"
    component = config.components["my_prefs"]
    assert component == ComponentConfig(UrlSource(["gs://path/to/preference/data/*.jsonl.gz"]), FormatConfig())


def test_the_section_of_the_documentation_parses():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    [config] = re.findall(r"```yaml\ndata:\n(.*?)```", page, flags=re.DOTALL)
    assert list(parsed(config).components) == ["general", "helpful"]


def test_types_may_be_left_out():
    config = parsed("components: {a: {source: {train_urls: [a.jsonl]}}, b: {source: {type: hf, id: x/y}}}")
    assert config.components == {"a": ComponentConfig(UrlSource(["a.jsonl"])), "b": ComponentConfig(HubSource("x/y"))}


@pytest.mark.parametrize(
    "text",
    [
        "components: {a: {source: {train_urls: [a], urls: [b]}}}",
        "components: {a: {source: {train_urls: [a]}, format: {slice: raise}}}",
        "components: {a: {source: {train_urls: [a]}, weight: 1}}",
        "{components: {a: {source: {train_urls: [a]}}}, shufle: true}",
        "components: {a: {source: {train_urls: [a]}, format: {slice_strategy: cut}}}",
        "components: {a: {source: {train_urls: [a]}, format: {type: chat}}}",
        "components: {a: {source: {train_urls: [a]}, format: {strings: message}}}",
        "components: {a: {source: {type: ftp}}}",
    ],
)
def test_unknown_keys_and_choices_are_errors(text):
    with pytest.raises(draccus.utils.DecodingError):
        parsed(text)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"train_weights names \['c'\]; the components are \['a', 'b'\]"),
        ({"a": 1.0}, r"no weight for \['b'\]"),
        ({"a": -1.0, "b": 1.0}, "not negative; found {'a': -1.0}"),
        ({"a": float("nan"), "b": 1.0}, "found {'a': nan}"),
        ({"a": 0.0, "b": 0.0}, "all zero"),
        ({"a": 1.0, "b": 1.0}, "train_weights.b=1.0, but b has no training rows"),
    ],
)
def test_weights_that_make_no_sense_are_errors(weights, message):
    components = {"a": ComponentConfig(UrlSource(["a"])), "b": ComponentConfig(UrlSource(validation_urls=["b"]))}
    with pytest.raises(ValueError, match=message):
        PreferenceDataConfig(components, train_weights=weights)
    assert PreferenceDataConfig(components, train_weights={"a": 2.0, "b": 0.0})


def test_at_least_one_process_tokenizes():
    with pytest.raises(ValueError, match="data.num_proc=0 must be at least 1; null chooses by the number of cores"):
        PreferenceDataConfig({"a": ComponentConfig(UrlSource(["a"]))}, num_proc=0)


def test_the_cache_must_be_a_folder_of_this_machine():
    with pytest.raises(ValueError, match="data.cache_dir='gs://x' must be a folder"):
        PreferenceDataConfig({"a": ComponentConfig(UrlSource(["a"]))}, cache_dir="gs://x")


def test_a_template_may_be_a_text_or_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert FormatConfig(chat_template=str(tmp_path / "mine.jinja")).template_text() == "{{ messages }}"
    assert FormatConfig(chat_template="{% if a %}{% endif %}").template_text() == "{% if a %}{% endif %}"
    with pytest.raises(FileNotFoundError, match="neither a Jinja template nor a file"):
        FormatConfig(chat_template="missing.jinja").template_text()
    (tmp_path / "mine.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="format.chat_template=.*mine.jinja' cannot be read as UTF-8 text"):
        FormatConfig(chat_template=str(tmp_path / "mine.jinja")).template_text()
