import json
import shutil
import weakref
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from haliax.partitioning import set_mesh
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tiny_models import (
    load,
    logits,
    random_tokens,
    tiny_folder,
    tiny_model,
    tiny_tokenizer,
    torch_logits,
    with_random_adapters,
)

from lora_dpo_jax.huggingface import weights
from lora_dpo_jax.huggingface.adapters import load_adapter, save_adapter
from lora_dpo_jax.huggingface.tensors import TensorFiles, TensorInfo, write_shards
from lora_dpo_jax.huggingface.weights import read_config, save_merged
from lora_dpo_jax.lora import LoraConfig, merge_lora, trainable_filter
from lora_dpo_jax.models import CausalLM

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LORA = LoraConfig(r=4, alpha=8.0, target_modules=["q_proj", "o_proj", "down_proj"])
ALL_LAYERS = LoraConfig(r=4, alpha=8.0)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


DTYPES = {"flags": "BOOL", "scalar": "I64", "half": "BF16", "empty": "F32"}


def trained(model: CausalLM, config: LoraConfig = LORA) -> CausalLM:
    return with_random_adapters(model, config)


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def saved_by_transformers(architecture: str, folder: Path, *, dtype=None, **settings) -> Path:
    tiny_model(architecture).to(dtype).save_pretrained(folder, **settings)
    return folder


@pytest.fixture
def copied(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder("qwen2"), tmp_path / "model"))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_weights(model: CausalLM, other: CausalLM) -> None:
    assert eqx.tree_equal(model, other)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path):
    folder = saved_by_transformers("qwen3", tmp_path, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same_weights(load(folder), load(tiny_folder("qwen3")))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_asked_for(stored, dtype, tmp_path):
    folder = saved_by_transformers("smollm2", tmp_path, dtype=getattr(torch, stored))
    model = load(folder, dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {np.dtype(dtype)}
    stored_embedding = tensors_in(folder)["model.embed_tokens.weight"]
    np.testing.assert_array_equal(model.model.embed_tokens.weight.array, stored_embedding.astype(dtype))


def test_under_a_mesh_each_device_holds_its_part():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    mapping = {"embed": "data", "mlp": "model", "q_heads_per_group": "model", "vocab": "model"}
    with set_mesh(mesh):
        sharded = load(tiny_folder("qwen2"), mapping=mapping)
    assert_same_weights(jax.device_get(sharded), jax.device_get(load(tiny_folder("qwen2"))))
    (layer,) = sharded.model.layers.segments[0].stacked.layers
    parts_of = [(layer.mlp.up_proj, 8), (layer.self_attn.q_proj, 8), (layer.before_attention, 4)]
    for weight, parts in ((module.weight, parts) for module, parts in parts_of):
        assert weight.array.addressable_shards[0].data.size * parts == weight.array.size


@pytest.mark.parametrize("block_bytes", [2**24, 100])
def test_any_part_of_a_tensor_can_be_read(block_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_dpo_jax.huggingface.tensors.BLOCK_BYTES", block_bytes)
    values = np.arange(7 * 9 * 4).reshape(7, 9, 4)
    stored = {str(dtype): values.astype(dtype) for dtype in (np.float32, jnp.bfloat16, np.int64)}
    save_file({**stored, "scalar": np.array(3.0)}, tmp_path / "model.safetensors")
    tensors = TensorFiles(tmp_path)
    everything, some = slice(None), slice(2, 6)
    for name, tensor in stored.items():
        for index in [
            (),
            (some,),
            (everything, some),
            (some, everything, slice(1, 2)),
            (slice(3, 3),),
            (everything,) * 3,
        ]:
            part = tensors.view(name)[index]
            assert part.dtype == tensor.dtype
            np.testing.assert_array_equal(part, tensor[index])
        np.testing.assert_array_equal(tensors.read(name), tensor)
    assert tensors.read("scalar") == 3.0


class CountingView:
    """A lazy tensor that notes how many numbers are read of it at a time."""

    def __init__(self, view, reads: list[int]):
        self.view, self.reads = getattr(view, "view", view), reads  # a view of a view counts once

    def __getitem__(self, index) -> np.ndarray:
        part = self.view[index]
        self.reads.append(part.size)
        return part


@pytest.mark.parametrize(
    ("shape", "mapping"),
    [
        ((8, 1), {"embed": "data"}),
        ((4, 2), {"embed": "data", "mlp": "model", "kv_head": "model"}),
        ((1, 2), {"mlp": "model", "kv_head": "model"}),
    ],
)
@pytest.mark.parametrize("with_adapters", [False, True])
def test_what_devices_read_is_their_part_and_no_more(shape, mapping, with_adapters, tmp_path, monkeypatch):
    folder = tiny_folder("llama2")
    if with_adapters:
        base = load(folder)
        save_adapter(trained(base, ALL_LAYERS), tmp_path, base_model="base", config=ALL_LAYERS)
    reads: list[int] = []
    view = TensorFiles.view
    monkeypatch.setattr(TensorFiles, "view", lambda files, name: CountingView(view(files, name), reads))
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "model"))
    monkeypatch.setattr(CountingView, "info", property(lambda self: self.view.info), raising=False)
    with set_mesh(mesh):
        model = load_adapter(base, tmp_path, mapping=mapping) if with_adapters else load(folder, mapping=mapping)
    read = eqx.filter(model, trainable_filter(model)) if with_adapters else model
    # What all devices hold whole is read once.
    held = [
        leaf.size if leaf.is_fully_replicated else sum(shard.data.size for shard in leaf.addressable_shards)
        for leaf in jax.tree.leaves(read)
    ]
    assert sum(reads) == sum(held)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(Q_PROJ), f"missing: {Q_PROJ}"),
        (lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": np.ones(8)}), "no place for: .*q_norm.weight"),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.ones((48, 32))}), "no place for: .*layers.3"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:16].copy()}), rf"{Q_PROJ} has shape \(16, 32\).*asks for \(32, 32\)"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_errors_that_name_them(copied, change, says):
    change_tensors(copied, change)
    with pytest.raises(ValueError, match=says) as error:
        load(copied)
    assert str(copied) in str(error.value)


def test_what_old_checkpoints_store_though_it_follows_from_the_config_is_no_surplus(copied):
    change_tensors(copied, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    assert_same_weights(load(copied), load(tiny_folder("qwen2")))


def test_a_tied_model_may_store_its_head_if_it_is_the_embedding(tmp_path):
    folder = saved_by_transformers("smollm2", tmp_path)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert_same_weights(load(folder), load(tiny_folder("smollm2")))
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load(folder)


def test_a_tied_model_may_store_its_matrix_as_the_head_alone(tmp_path):
    folder = saved_by_transformers("smollm2", tmp_path / "model")
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    model = load(folder)
    assert_same_weights(model, load(tiny_folder("smollm2")))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = random_tokens(1, 8)
    np.testing.assert_allclose(logits(model, tokens), torch_logits(theirs, tokens), rtol=0, atol=1e-4)

    adapted = trained(model)
    save_merged(adapted, folder, tmp_path / "merged")
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(logits(adapted, tokens), torch_logits(merged, tokens), rtol=0, atol=1e-4)


def test_the_single_file_counts_beside_an_index_as_for_transformers(tmp_path):
    folder = saved_by_transformers("qwen3", tmp_path, max_shard_size="20KB")
    single = tensors_in(saved_by_transformers("qwen3", tmp_path / "single"))
    other = {name: value * np.float32(1.5) for name, value in single.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    np.testing.assert_array_equal(theirs[Q_PROJ].numpy(), other[Q_PROJ])
    np.testing.assert_array_equal(TensorFiles(folder).read(Q_PROJ), other[Q_PROJ])
    assert TensorFiles(folder).files == [folder / "model.safetensors"]
    (folder / "model.safetensors.index.json").write_text('{"weight_map": null}')
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: weight_map=None must be an object"):
        TensorFiles(folder)


@pytest.mark.parametrize(
    "file", ["../other/model.safetensors", "/model.safetensors", "a/../../model.safetensors", ".", "x.bin"]
)
def test_an_index_leads_to_no_file_but_safetensors_in_its_folder(file, tmp_path):
    (tmp_path / "other").mkdir()
    save_file({"w": np.ones(3)}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(ValueError, match=f"weight_map: w='{file}' must be the path of a .safetensors file within"):
        TensorFiles(tmp_path / "model")


def test_an_index_may_lead_through_a_link_as_in_the_cache_of_the_hub(tmp_path):
    save_file({"w": np.ones(3)}, tmp_path / "blob")
    folder = tmp_path / "snapshot"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "one.safetensors").symlink_to("../../blob")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "shards/one.safetensors"}}')
    np.testing.assert_array_equal(TensorFiles(folder).read("w"), np.ones(3))


def test_quantized_weights_are_refused_though_the_config_does_not_say_so(copied):
    change_tensors(copied, lambda t: t.update({Q_PROJ: np.ones(t[Q_PROJ].shape, np.int8)}))
    with pytest.raises(ValueError, match=f"tensor {Q_PROJ} holds I8.*not quantized"):
        load(copied)


@pytest.mark.parametrize("other", ["pytorch_model.bin", "consolidated.00.pth", "model-Q4_K_M.gguf"])
@pytest.mark.parametrize("with_config", [True, False])
def test_weights_in_another_format_are_refused_with_what_to_do(other, with_config, copied):
    (copied / "model.safetensors").rename(copied / other)
    if not with_config:
        (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{copied}.*save_pretrained.*\.gguf.*found .*{other}"):
        load(copied)


def test_an_adapter_in_the_place_of_a_model_says_where_both_belong(tmp_path):
    save_adapter(trained(load(tiny_folder("qwen2"))), tmp_path, base_model="org/base", config=LORA)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds an adapter.*'org/base'.*initialize_from_hf.*_peft"):
        read_config(tmp_path)


def test_a_merged_model_brings_all_named_chat_templates(copied, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(copied)
    model = trained(load(copied))
    save_merged(model, copied, tmp_path / "as_it_was")
    save_merged(model, copied, tmp_path / "given", tokenizer=tokenizer)
    for name in ("as_it_was", "given"):
        kept = transformers.AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert kept == tokenizer.chat_template


def test_broken_folders_say_which_file(copied):
    whole = (copied / "model.safetensors").read_bytes()
    (copied / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or only part of one"):
        load(copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*found .*config\.json"):
        load(copied)
    index = {"weight_map": dict.fromkeys(tensors_in(tiny_folder("qwen2")), "model-00001-of-00002.safetensors")}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
        load(copied)
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        read_config(copied)


def test_unknown_features_of_a_config_are_errors_that_name_the_folder(copied):
    config = json.loads((copied / "config.json").read_text()) | {"attn_logit_softcapping": 50.0}
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="attn_logit_softcapping") as error:
        read_config(copied)
    assert str(copied) in str(error.value)


def test_a_merged_bfloat16_model_is_that_of_peft_bit_for_bit(tmp_path):
    source = saved_by_transformers("qwen3", tmp_path / "source", dtype=torch.bfloat16)
    model = trained(load(source, jnp.bfloat16))
    save_adapter(model, tmp_path / "adapter", base_model=str(source), config=LORA)
    save_merged(model, source, tmp_path / "merged")

    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype="bfloat16")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "merged"), tensors_in(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_merging_in_the_file_is_merging_in_the_tree(tmp_path):
    model = trained(load(tiny_folder("llama2")), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    save_merged(model, tiny_folder("llama2"), tmp_path / "merged")
    assert_same_weights(load(tmp_path / "merged"), merge_lora(model))


def test_merging_starts_from_the_source_not_from_its_rounded_copy(tmp_path):
    source = tiny_folder("llama2")
    config = LoraConfig(r=4, alpha=8.0, target_modules=["q_proj", "lm_head"])
    save_merged(trained(load(source, jnp.bfloat16), config), source, tmp_path / "low")
    save_merged(trained(load(source, jnp.float32), config), source, tmp_path / "high")
    before, low, high = (tensors_in(folder) for folder in (source, tmp_path / "low", tmp_path / "high"))
    for name, value in before.items():
        np.testing.assert_array_equal(low[name], high[name], err_msg=name)
        assert low[name].dtype == np.float32
        changed = name.endswith("q_proj.weight") or name == "lm_head.weight"
        assert np.array_equal(value, low[name]) != changed, name


def test_a_merged_model_brings_all_that_belongs_to_its_base(tmp_path):
    source = tiny_folder("llama3.1")
    save_merged(trained(load(source)), source, tmp_path / "merged")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(source).chat_template
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_merged_model_can_bring_the_tokenizer_it_was_trained_with(tmp_path):
    source = tiny_folder("llama2")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_merged(trained(load(source)), source, tmp_path / "merged", tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_a_merged_model_keeps_all_chat_templates_of_its_base(copied, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(copied)
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(copied)
    save_merged(trained(load(copied)), copied, tmp_path / "merged")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


def test_what_does_not_belong_to_the_merged_model_stays_behind(copied, tmp_path):
    for name in ("pytorch_model.bin", "trainer_state.json", "adapter_config.json", "README.md"):
        (copied / name).write_text("{}")
    save_merged(trained(load(copied)), copied, tmp_path / "merged")
    left = {path.name for path in copied.iterdir()} - {path.name for path in (tmp_path / "merged").iterdir()}
    assert left == {"pytorch_model.bin", "trainer_state.json", "adapter_config.json", "README.md"}


def test_a_large_merged_model_is_sharded_with_an_index(tmp_path):
    source = saved_by_transformers("qwen2", tmp_path / "source", max_shard_size="30KB")
    model = trained(load(source))
    save_merged(model, source, tmp_path / "merged", max_shard_bytes=20_000)
    files = sorted((tmp_path / "merged").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = [sum(value.nbytes for value in load_file(file).values()) for file in files]
    assert len(files) > 2 and max(largest) <= 20_000
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(largest)

    save_merged(model, source, tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_weights(load(tmp_path / "merged"), load(tmp_path / "one"))
    tokens = random_tokens(1, 8)
    theirs = [
        torch_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name), tokens)
        for name in ("merged", "one")
    ]
    np.testing.assert_array_equal(*theirs)


def test_tensors_of_several_dtypes_are_written_as_they_are(tmp_path):
    tensors = {
        "flags": np.array([True, False, True]),
        "scalar": np.array(3, np.int64),
        "half": np.arange(6, dtype=jnp.bfloat16).reshape(2, 3).T,
        "empty": np.zeros((0, 4), np.float32),
    }
    infos = {name: TensorInfo(kind, tensors[name].shape) for name, kind in DTYPES.items()}
    write_shards(tmp_path, infos, tensors.__getitem__, max_shard_bytes=1000)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: value.dtype for name, value in found.items()} == {name: x.dtype for name, x in tensors.items()}
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)


def test_a_tensor_that_is_not_what_the_header_says_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tensor w is float32 \(3,\), not TensorInfo\(dtype='BF16', shape=\(3,\)\)"):
        write_shards(tmp_path, {"w": TensorInfo("BF16", (3,))}, lambda _: np.zeros(3, np.float32), max_shard_bytes=9)


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    alive: list[weakref.ref] = []

    def read(name: str) -> np.ndarray:
        assert not any(tensor() is not None for tensor in alive)
        tensor = np.full(1000, float(name[1:]), np.float32)
        alive.append(weakref.ref(tensor))
        return tensor

    infos = {f"w{number}": TensorInfo("F32", (1000,)) for number in range(5)}
    write_shards(tmp_path, infos, read, max_shard_bytes=9000)
    assert [float(value[0]) for value in tensors_in(tmp_path).values()] == [0, 1, 2, 3, 4]


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(weights, "write_shards", fail)
    model = trained(load(tiny_folder("qwen2")))
    with pytest.raises(OSError, match="disk full"):
        save_merged(model, tiny_folder("qwen2"), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_merging_into_another_base_is_refused(tmp_path):
    model = trained(load(tiny_folder("llama2")))
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \(64, 32\), its adapter \(32, 32\)"):
        save_merged(model, tiny_folder("qwen3"), tmp_path / "merged")
    head = trained(load(tiny_folder("llama2")), LoraConfig(r=4, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="no tensor lm_head.weight"):
        save_merged(head, tiny_folder("smollm2"), tmp_path / "merged")
