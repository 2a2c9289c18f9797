"""Settings that a base cannot have are refused before the data or any weights are read."""

import pytest
from tiny_runs import instruct_folder, run_config

from lora_dpo_jax.main.train import main
from lora_dpo_jax.runs import base


@pytest.mark.parametrize(
    "settings, told",
    [
        (
            dict(lora__trainable_token_indices=[7]),
            r"trainable_token_indices=\[7\] is a list, and the head .* both",
        ),
        (
            dict(lora__trainable_token_indices={"embed_tokens": [300]}),
            "names 300, and embed_tokens has the rows 0 to",
        ),
        (dict(gguf_save_path="GGUF", lora__use_dora=True), "lora.use_dora=True has no form in a GGUF adapter"),
    ],
)
def test_adapters_that_do_not_suit_the_base_are_refused_first(settings, told, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "load_weights", lambda *_, **__: pytest.fail("the weights were read"))
    settings = {name: str(tmp_path / "out") if value == "GGUF" else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=told):
        main(run_config(tmp_path, tmp_path / "no_such_rows.jsonl", **settings))
    assert instruct_folder().exists() and not (tmp_path / "out").exists()
