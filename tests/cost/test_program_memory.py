import jax
import jax.numpy as jnp

from lora_dpo_jax.cost.memory import ProgramMemory, largest_arrays


def test_memory_and_the_largest_arrays():
    def program(x):
        return jnp.sort(jnp.sin(x[:, None] * x), axis=0).sum(axis=0)  # what is sorted lies in memory, fused or not

    compiled = jax.jit(program).lower(jnp.zeros(256)).compile()
    assert largest_arrays(compiled.as_text(), 1) == ["f32[256,256]"]
    memory = ProgramMemory.of(compiled)
    assert memory.arguments == 1024 and memory.outputs == 1024
    assert 256 * 256 * 4 <= memory.temporary <= 4 * 256 * 256 * 4
    assert memory.total == memory.arguments + memory.outputs + memory.temporary + memory.code
