"""Suggestions for an unknown setting: a similar name, or the name here of another program's setting."""

import difflib

from lora_dpo_jax.settings.schema import NAME, NUMBER, Setting, settings_of

# (a setting here, a note on it): its names in TRL, transformers, PEFT, axolotl, LLaMA-Factory and Levanter.
_NAMES_ELSEWHERE = {
    ("initialize_from_hf", ""): (
        "model_name_or_path pretrained_model_name_or_path model_name model_id model_path base_model"
    ),
    ("hf_revision", ""): "model_revision revision",
    ("data.tokenizer", ""): "tokenizer_name tokenizer_name_or_path",
    ("initialize_from_peft", ""): "adapter_name_or_path adapter_path lora_model_dir",
    ("lora.r", " and others of lora for new adapters, or initialize_from_peft for given ones"): "adapter",
    ("data.components", ": NAME: {source: {type: url, train_urls: [...]}}"): (
        "dataset datasets dataset_name dataset_path data_path data_files train_dataset train_file"
    ),
    ("data.num_proc", ""): "dataset_num_proc preprocessing_num_workers dataset_processes",
    ("validation_split_fraction", ""): "val_size val_set_size test_size",
    (
        "train_seq_len",
        ", which bounds prompt + one response; format.slice_strategy says what becomes of longer rows",
    ): (
        "max_length max_len max_seq_len max_seq_length model_max_length max_prompt_length max_completion_length "
        "max_target_length sequence_len seq_len cutoff_len sequence_length"
    ),
    ("data.components.NAME.format.slice_strategy", ""): "truncation_mode",
    ("data.components.NAME.format.train_on", ": response, all_turns or last_turn"): (
        "assistant_only_loss completion_only_loss train_on_inputs roles_to_train mask_history"
    ),
    ("lora.r", ""): "rank lora_r lora_rank",
    ("lora.alpha", ""): "lora_alpha",
    ("lora.dropout", ""): "lora_dropout",
    ("lora.target_modules", ": null is every linear layer of the decoder"): (
        "lora_target lora_target_modules lora_target_linear target_modules"
    ),
    ("lora.target_parameters", ""): "lora_target_parameters",
    ("lora.a_init", ""): "init_lora_weights",
    ("lora.layers_to_transform", ""): "peft_layers_to_transform",
    ("lora.layers_pattern", ""): "peft_layers_pattern",
    ("lora.r", " and the other settings of lora"): "peft_config",
    ("loss.type", ""): "loss_type pref_loss",
    ("beta", ""): "pref_beta dpo_beta",
    ("peft_reference", ": the reference is the base without its adapters, or the adapter of initialize_from_peft"): (
        "ref_model ref_model_path ref_model_name_or_path reference_model reference_model_path force_use_ref_model "
        "ref_adapter_name reference reference_is_hf"
    ),
    ("loss.reference_free", ""): "reference_free",
    ("reference_log_probs", ": cached"): "precompute_ref_log_probs",
    ("optimizer.learning_rate", ""): "learning_rate lr",
    ("optimizer.lr_schedule", ""): "lr_scheduler lr_scheduler_type",
    ("optimizer.lr_schedule", " and what stands beside it: num_cycles, power, lr_end, num_decay_steps, timescale"): (
        "lr_scheduler_kwargs"
    ),
    ("optimizer.warmup", ": below 1 a fraction of the run, from 1 on a number of steps"): (
        "warmup_ratio warmup_steps num_warmup_steps"
    ),
    ("optimizer.beta1", ""): "adam_beta1",
    ("optimizer.beta2", ""): "adam_beta2",
    ("optimizer.epsilon", ""): "adam_epsilon",
    ("optimizer.lora_plus_ratio", ""): "loraplus_lr_ratio lorap_lr_ratio",
    ("optimizer.max_grad_norm", ""): "gradient_clipping clip_grad_norm",
    ("optimizer.type", ": adamw, adamw_8bit, adafactor, lion, muon or schedule_free"): "optim optimizer_type",
    ("trainer.train_batch_size", ": pairs per update over all devices. Gradients accumulate by themselves"): (
        "per_device_train_batch_size gradient_accumulation_steps batch_size global_batch_size"
    ),
    ("trainer.per_device_parallelism", ": what a device computes at once, in pairs of the longest length"): (
        "micro_batch_size"
    ),
    ("trainer.per_device_eval_parallelism", ""): "per_device_eval_batch_size eval_batch_size",
    ("trainer.num_train_steps", ""): "max_steps num_steps train_steps",
    ("trainer.num_train_epochs", ""): "epochs num_epochs",
    ("trainer.steps_per_eval", ""): "eval_steps eval_strategy evaluation_strategy evals_per_epoch",
    ("trainer.eval_at_start", ""): "eval_on_start",
    ("trainer.best.metric", " and trainer.best.mode"): (
        "load_best_model_at_end metric_for_best_model greater_is_better save_best_model"
    ),
    ("trainer.early_stopping.patience", ""): "early_stopping_patience early_stopping_steps",
    ("trainer.early_stopping.min_delta", ""): "early_stopping_threshold",
    ("trainer.log_every", ""): "logging_steps",
    ("trainer.log_dir", ""): "logging_dir",
    ("trainer.checkpointer.keep", " and trainer.checkpointer.save_interval"): (
        "save_steps save_strategy save_total_limit saves_per_epoch"
    ),
    ("trainer.checkpointer.base_path", ""): "checkpoint_dir",
    ("trainer.id", ": a run of an id that was here before resumes; trainer.load_checkpoint"): "resume_from_checkpoint",
    ("trainer.id", ": a run of an id that was here before resumes"): (
        "auto_resume_from_checkpoints load_checkpoint_path"
    ),
    ("trainer.id", ""): "run_id",
    ("trainer.id", ", or the name of trainer.tracker: {type: wandb, name: ...}"): "run_name",
    ("trainer.tracker.N.type", ": trainer.tracker: [wandb, tensorboard]"): "report_to",
    ("trainer.tracker.N.type", ": trainer.tracker: wandb"): "use_wandb",
    ("trainer.tracker.N.project", ": trainer.tracker: {type: wandb, project: ...}"): "wandb_project",
    ("trainer.tracker.N.entity", ": trainer.tracker: {type: wandb, entity: ...}"): "wandb_entity",
    ("trainer.seed", ""): "seed data_seed",
    (
        "peft_save_path",
        " (the adapter), merged_hf_save_path (the merged model) and trainer.log_dir (logs, checkpoints)",
    ): ("output_dir save_path hf_save_path export_dir hf_upload merged_hf_upload"),
    (
        "peft_save_path",
        " (the adapter) or merged_hf_save_path (the merged model); output is one of evaluate and generate",
    ): "output",
    ("initialize_from_hf", ", of which config.json is always used"): "use_hf_model_config",
    ("layout.packing", ""): "sample_packing",
    ("trainer.mp", " (of adapters and computation), and model.dtype (of the frozen weights)"): (
        "bf16 fp16 precision torch_dtype"
    ),
    ("model.quantization", ": nf4"): "load_in_4bit",
    ("model.quantization", ": int8"): "load_in_8bit",
    ("model.quantization", ": nf4 or int8"): "quantization_bit",
    ("model.attention", ""): "attn_implementation flash_attention flash_attn",
    ("model.gradient_checkpointing", ""): "remat",
    (
        "trainer.mesh.axes",
        ": {data: -1} splits the weights over all devices, {model: 4} splits each layer over four",
    ): ("model_axis_size replica_ici_axis_size fsdp fsdp_axis deepspeed tensor_parallel_size tensor_parallel_axes"),
    ("data.components.NAME.format.chat_template", ""): "chat_template_path",
    ("config_path", ", the file of settings"): "config config_file",
    ("max_new_tokens", ""): "max_tokens",
}
OTHER_NAMES: dict[str, tuple[str, str]] = {
    name: setting for setting, names in _NAMES_ELSEWHERE.items() for name in names.split()
}
MOST = 3  # names in an answer


def unknown_setting(config_class: type, path: str) -> tuple[str, str]:
    """(`path`, the rest of the message): it is no setting of the command, and which setting may have been meant."""
    settings = settings_of(config_class)
    name = path.rpartition(".")[2].replace("-", "_").lower()
    readable = path if path.isprintable() else repr(path)
    known = {"config_path", "beta", *(setting.path for setting in settings), *_sections(settings)}
    if name in OTHER_NAMES and OTHER_NAMES[name][0] in known and OTHER_NAMES[name][0] != path:
        setting, more = OTHER_NAMES[name]
        return readable, f" is no setting. Here it is {_filled(setting, path)}{more}"
    if name == "config_path":
        return readable, " is no setting. Write --config_path"
    if of := [setting.types for setting in settings if _filled(setting.path, path) == path and setting.types]:
        return readable, f" is a setting of type {' and '.join(of[0])} alone, and the type here is another"
    near = _nearest(path, name, settings)
    if near:
        return readable, f" is no setting. The nearest: {', '.join(near)}"
    section = path.rpartition(".")[0]
    of_it = [setting for setting in settings if _filled(setting.section, section) == section]
    if any(setting.types for setting in of_it):  # a choice, of which a plugin may have types
        return readable, f" is no setting. {section} has {', '.join(setting.name for setting in of_it)}"
    return readable, " is no setting; --help lists them"


def setting_at(config_class: type, path: str) -> Setting | None:
    """The setting that a path names, with the user's own names in it."""
    return next((found for found in settings_of(config_class) if _filled(found.path, path) == path), None)


def _sections(settings: tuple[Setting, ...]) -> set[str]:
    return {setting.section for setting in settings}


def _nearest(path: str, name: str, settings: tuple[Setting, ...]) -> list[str]:
    paths = [_filled(setting.path, path) for setting in settings]
    paths += [section for section in dict.fromkeys(_filled(each.section, path) for each in settings) if section]
    alike = [found for found in paths if found.rpartition(".")[2] == name]
    siblings = [found for found in paths if found.rpartition(".")[0] == path.rpartition(".")[0]]
    near = difflib.get_close_matches(path, siblings, MOST, 0.75)
    near += alike
    names = {found.rpartition(".")[2] for found in paths}
    for other in difflib.get_close_matches(name, sorted(names), MOST, 0.75):
        near += [found for found in paths if found.rpartition(".")[2] == other]
    return list(dict.fromkeys(near))[:MOST]


def _filled(pattern: str, path: str) -> str:
    """The pattern with the path's own names in the places of NAME and N."""
    parts = pattern.split(".")
    for place, (part, given) in enumerate(zip(parts, path.split("."), strict=False)):
        if part in (NAME, NUMBER):
            parts[place] = given
        elif part != given:
            break
    return ".".join(parts)
