"""With one process nothing is exchanged. tests/test_processes.py starts several."""

from lora_dpo_jax.processes.exchange import from_each_process, from_first_process, in_turns, refuse_differences


def test_alone_nothing_is_exchanged():
    assert in_turns(lambda: 3) == 3
    assert from_first_process("text") == "text"
    assert from_each_process("text") == ["text"]
    refuse_differences({"name": "value"})
