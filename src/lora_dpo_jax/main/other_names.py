"""What a setting that is not known may have meant: a near name, or the name here of what others call so."""

import difflib

from lora_dpo_jax.main.settings import NAME, NUMBER, Setting, settings_of

_BATCH = "trainer.train_batch_size", ": pairs per update over all devices. Gradients accumulate by themselves"
_PARALLELISM = "trainer.per_device_parallelism", ": what a device computes at once, in pairs of the longest length"
_LENGTH = (
    "train_seq_len",
    ", which bounds prompt + one response; format.slice_strategy says what becomes of longer rows",
)
_REFERENCE = (
    "peft_reference",
    ": the reference is the base without its adapters, or the adapter of initialize_from_peft",
)
_WARMUP = "optimizer.warmup", ": below 1 a fraction of the run, from 1 on a number of steps"
_PRECISION = "trainer.mp", " (of adapters and computation), and model.dtype (of the frozen weights)"
_OUTPUT = (
    "peft_save_path",
    " (the adapter), merged_hf_save_path (the merged model) and trainer.log_dir (logs, checkpoints)",
)
_MESH = "trainer.mesh.axes", ": {data: -1} splits the weights over all devices, {model: 4} splits each layer over four"
_CHECKPOINTS = "trainer.checkpointer.keep", " and trainer.checkpointer.save_interval"
_EVAL = "trainer.steps_per_eval", ""
_DATA = "data.components", ": NAME: {source: {type: url, train_urls: [...]}}"

# What TRL, transformers, PEFT, axolotl, LLaMA-Factory and Levanter call what is here (a setting, and more on it).
OTHER_NAMES: dict[str, tuple[str, str]] = {
    "model_name_or_path": ("initialize_from_hf", ""),
    "pretrained_model_name_or_path": ("initialize_from_hf", ""),
    "model_name": ("initialize_from_hf", ""),
    "model_id": ("initialize_from_hf", ""),
    "model_path": ("initialize_from_hf", ""),
    "base_model": ("initialize_from_hf", ""),
    "model_revision": ("hf_revision", ""),
    "revision": ("hf_revision", ""),
    "tokenizer_name": ("data.tokenizer", ""),
    "tokenizer_name_or_path": ("data.tokenizer", ""),
    "adapter_name_or_path": ("initialize_from_peft", ""),
    "adapter_path": ("initialize_from_peft", ""),
    "adapter": ("lora.r", " and others of lora for new adapters, or initialize_from_peft for given ones"),
    "lora_model_dir": ("initialize_from_peft", ""),
    "dataset": _DATA,
    "datasets": _DATA,
    "dataset_name": _DATA,
    "dataset_path": _DATA,
    "data_path": _DATA,
    "data_files": _DATA,
    "train_dataset": _DATA,
    "train_file": _DATA,
    "val_size": ("validation_split_fraction", ""),
    "val_set_size": ("validation_split_fraction", ""),
    "test_size": ("validation_split_fraction", ""),
    "max_length": _LENGTH,
    "max_len": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "model_max_length": _LENGTH,
    "max_prompt_length": _LENGTH,
    "max_completion_length": _LENGTH,
    "max_target_length": _LENGTH,
    "sequence_len": _LENGTH,
    "seq_len": _LENGTH,
    "cutoff_len": _LENGTH,
    "truncation_mode": ("data.components.NAME.format.slice_strategy", ""),
    "rank": ("lora.r", ""),
    "lora_r": ("lora.r", ""),
    "lora_rank": ("lora.r", ""),
    "lora_alpha": ("lora.alpha", ""),
    "lora_dropout": ("lora.dropout", ""),
    "lora_target": ("lora.target_modules", ": null is every linear layer of the decoder"),
    "lora_target_modules": ("lora.target_modules", ": null is every linear layer of the decoder"),
    "lora_target_linear": ("lora.target_modules", ": null is every linear layer of the decoder"),
    "target_modules": ("lora.target_modules", ": null is every linear layer of the decoder"),
    "init_lora_weights": ("lora.a_init", ""),
    "layers_to_transform": ("lora.target_modules", ": a regular expression for whole paths can name layers"),
    "peft_config": ("lora.r", " and the other settings of lora"),
    "loss_type": ("loss.type", ""),
    "pref_loss": ("loss.type", ""),
    "pref_beta": ("beta", ""),
    "dpo_beta": ("beta", ""),
    "ref_model": _REFERENCE,
    "ref_model_path": _REFERENCE,
    "ref_model_name_or_path": _REFERENCE,
    "reference_model": _REFERENCE,
    "reference_model_path": _REFERENCE,
    "force_use_ref_model": _REFERENCE,
    "ref_adapter_name": _REFERENCE,
    "reference": _REFERENCE,
    "reference_is_hf": _REFERENCE,
    "reference_free": ("loss.reference_free", ""),
    "precompute_ref_log_probs": ("reference_log_probs", ": cached"),
    "learning_rate": ("optimizer.learning_rate", ""),
    "lr": ("optimizer.learning_rate", ""),
    "lr_scheduler": ("optimizer.lr_schedule", ""),
    "lr_scheduler_type": ("optimizer.lr_schedule", ""),
    "warmup_ratio": _WARMUP,
    "warmup_steps": _WARMUP,
    "num_warmup_steps": _WARMUP,
    "adam_beta1": ("optimizer.beta1", ""),
    "adam_beta2": ("optimizer.beta2", ""),
    "adam_epsilon": ("optimizer.epsilon", ""),
    "gradient_clipping": ("optimizer.max_grad_norm", ""),
    "clip_grad_norm": ("optimizer.max_grad_norm", ""),
    "optim": ("optimizer.learning_rate", " and the other settings of optimizer, which is AdamW"),
    "per_device_train_batch_size": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "micro_batch_size": _PARALLELISM,
    "per_device_eval_batch_size": ("trainer.per_device_eval_parallelism", ""),
    "eval_batch_size": ("trainer.per_device_eval_parallelism", ""),
    "max_steps": ("trainer.num_train_steps", ""),
    "num_steps": ("trainer.num_train_steps", ""),
    "train_steps": ("trainer.num_train_steps", ""),
    "epochs": ("trainer.num_train_epochs", ""),
    "num_epochs": ("trainer.num_train_epochs", ""),
    "eval_steps": _EVAL,
    "eval_strategy": _EVAL,
    "evaluation_strategy": _EVAL,
    "evals_per_epoch": _EVAL,
    "eval_on_start": ("trainer.eval_at_start", ""),
    "logging_steps": ("trainer.log_every", ""),
    "logging_dir": ("trainer.log_dir", ""),
    "save_steps": _CHECKPOINTS,
    "save_strategy": _CHECKPOINTS,
    "save_total_limit": _CHECKPOINTS,
    "saves_per_epoch": _CHECKPOINTS,
    "checkpoint_dir": ("trainer.checkpointer.base_path", ""),
    "resume_from_checkpoint": ("trainer.id", ": a run of an id that was here before resumes; trainer.load_checkpoint"),
    "auto_resume_from_checkpoints": ("trainer.id", ": a run of an id that was here before resumes"),
    "load_checkpoint_path": ("trainer.id", ": a run of an id that was here before resumes"),
    "run_id": ("trainer.id", ""),
    "run_name": ("trainer.id", ", or the name of trainer.tracker: {type: wandb, name: ...}"),
    "report_to": ("trainer.tracker.N.type", ": trainer.tracker: [wandb, tensorboard]"),
    "use_wandb": ("trainer.tracker.N.type", ": trainer.tracker: wandb"),
    "wandb_project": ("trainer.tracker.N.project", ": trainer.tracker: {type: wandb, project: ...}"),
    "wandb_entity": ("trainer.tracker.N.entity", ": trainer.tracker: {type: wandb, entity: ...}"),
    "seed": ("trainer.seed", ""),
    "data_seed": ("trainer.seed", ""),
    "output_dir": _OUTPUT,
    "save_path": _OUTPUT,
    "hf_save_path": _OUTPUT,
    "export_dir": _OUTPUT,
    "hf_upload": _OUTPUT,
    "merged_hf_upload": _OUTPUT,
    "use_hf_model_config": ("initialize_from_hf", ", of which config.json is always used"),
    "sample_packing": ("layout.packing", ""),
    "sequence_length": _LENGTH,
    "bf16": _PRECISION,
    "fp16": _PRECISION,
    "precision": _PRECISION,
    "torch_dtype": _PRECISION,
    "load_in_4bit": ("model.quantization", ": nf4"),
    "load_in_8bit": ("model.quantization", ": int8"),
    "quantization_bit": ("model.quantization", ": nf4 or int8"),
    "attn_implementation": ("model.attention", ""),
    "flash_attention": ("model.attention", ""),
    "flash_attn": ("model.attention", ""),
    "remat": ("model.gradient_checkpointing", ""),
    "model_axis_size": _MESH,
    "replica_ici_axis_size": _MESH,
    "fsdp": _MESH,
    "fsdp_axis": _MESH,
    "deepspeed": _MESH,
    "tensor_parallel_size": _MESH,
    "tensor_parallel_axes": _MESH,
    "chat_template_path": ("data.components.NAME.format.chat_template", ""),
    "config": ("config_path", ", the file of settings"),
    "config_file": ("config_path", ", the file of settings"),
    "max_tokens": ("max_new_tokens", ""),
}
MOST = 3  # names in an answer


def unknown_setting(config_class: type, path: str) -> tuple[str, str]:
    """`path`, and what to say of it: that it is no setting of the command, and what may have been meant."""
    settings = settings_of(config_class)
    name = path.rpartition(".")[2].replace("-", "_").lower()
    readable = path if path.isprintable() else repr(path)
    known = {"config_path", "beta", *(setting.path for setting in settings), *_sections(settings)}
    if name in OTHER_NAMES and OTHER_NAMES[name][0] in known and OTHER_NAMES[name][0] != path:
        return readable, " is no setting. Here it is " + "".join(OTHER_NAMES[name])
    if name == "config_path":
        return readable, " is no setting. Write --config_path"
    if of := [setting.types for setting in settings if _in_place_of(setting.path, path) == path and setting.types]:
        return readable, f" is a setting of type {' and '.join(of[0])} alone, and the type here is another"
    near = _nearest(path, name, settings)
    if near:
        return readable, f" is no setting. The nearest: {', '.join(near)}"
    return readable, " is no setting; --help lists them"


def _sections(settings: tuple[Setting, ...]) -> set[str]:
    return {setting.section for setting in settings}


def _nearest(path: str, name: str, settings: tuple[Setting, ...]) -> list[str]:
    paths = [_in_place_of(setting.path, path) for setting in settings]
    paths += [section for section in dict.fromkeys(setting.section for setting in settings) if section]
    alike = [found for found in paths if found.rpartition(".")[2] == name]
    siblings = [found for found in paths if found.rpartition(".")[0] == path.rpartition(".")[0]]
    near = difflib.get_close_matches(path, siblings, MOST, 0.75)
    near += alike
    names = {found.rpartition(".")[2] for found in paths}
    for other in difflib.get_close_matches(name, sorted(names), MOST, 0.75):
        near += [found for found in paths if found.rpartition(".")[2] == other]
    return list(dict.fromkeys(near))[:MOST]


def _in_place_of(pattern: str, path: str) -> str:
    """The pattern with the names of the path where the pattern leaves them open."""
    parts = pattern.split(".")
    for place, (part, given) in enumerate(zip(parts, path.split("."), strict=False)):
        if part in (NAME, NUMBER):
            parts[place] = given
        elif part != given:
            break
    return ".".join(parts)
