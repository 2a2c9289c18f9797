"""Compiled programs are kept for the next run, where the user wants them."""

from pathlib import Path

import jax

from lora_dpo_jax.files import cache_folder
from lora_dpo_jax.runs.compiled_programs import keep_compiled_programs


def test_a_folder_for_programs_that_was_chosen_is_kept(tmp_path):
    chosen = jax.config.jax_compilation_cache_dir
    assert chosen, "by the tests' environment, in the place of the user"
    try:
        keep_compiled_programs(None, tmp_path)
        assert jax.config.jax_compilation_cache_dir == chosen
        keep_compiled_programs("elsewhere", tmp_path)
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs(None, tmp_path)
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)


def test_caches_are_where_the_settings_say_or_the_environment(monkeypatch):
    monkeypatch.setenv("LORA_DPO_JAX_CACHE", "/caches")
    assert cache_folder(None) == Path("/caches")
    assert cache_folder("~/mine") == Path.home() / "mine"
