"""Small tokenizers trained here, and TRL's own tokenization of the same rows."""

import copy
import logging
import warnings

import pytest
from chat_templates import CHATML, DEEPSEEK, LLAMA, QWEN, SHIFTING, THINKING, TOOLS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>", "<think>", "</think>"]
CORPUS = [
    "The cat sat on the mat.\n\nThe answer is that the cat sat there.\n\n\n",
    "What is the capital of France? The capital of France is Paris.\n",
    "user\nassistant\nsystem\n tool result 1 2 3 4 5 6 7 8 9 0 Hello world, hello there! ",
    "assistant\n\nthe\n\n\ncat\n\nthat\n\n\nis\n\n\n\nthe user",
    "I think that the weather is good today; it is not bad.\n\n",
] * 4
# Llama 3's and Qwen's rule: a run of line ends is one word, together with the spaces before it.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama": (LLAMA, "<|eot|>"),
    "qwen": (QWEN, "<|im_end|>"),
    "thinking": (THINKING, "<|im_end|>"),
    "deepseek": (DEEPSEEK, "<|eot|>"),
    "shifting": (SHIFTING, "<|im_end|>"),
    "tools": (TOOLS, "<|eot|>"),
}


def _byte_level() -> Tokenizer:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    return model


def _metaspace() -> Tokenizer:
    """Like Llama 2: puts a space before whatever begins a text."""
    model = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    model.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    )
    return model


@pytest.fixture(scope="session")
def trained():
    return {"byte_level": _byte_level(), "metaspace": _metaspace()}


@pytest.fixture(scope="session")
def make_tokenizer(trained):
    """make_tokenizer("llama") has that template; add_bos and add_eos are what the tokenizer does to plain texts."""

    def make(template=None, *, kind="byte_level", add_bos=False, add_eos=False):
        model = copy.deepcopy(trained[kind])
        text, eos = TEMPLATES[template] if template else (None, "<|im_end|>")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|bos|>", eos_token=eos, pad_token=eos)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = text
        parts = ["<|bos|>"] * add_bos + ["$A"] + [eos] * add_eos
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join(parts),
            special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|bos|>", eos)],
        )
        return tokenizer

    return make


@pytest.fixture(scope="session")
def trl_pairs(tmp_path_factory):
    """trl_pairs(rows or Dataset, tokenizer): (prompt, chosen, rejected) ids of every row, made by TRL's DPOTrainer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
        from transformers import LlamaConfig, LlamaForCausalLM
        from trl import DPOConfig, DPOTrainer

    datasets.disable_progress_bars()

    def tokenize(rows, tokenizer, max_length=None):
        shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("trl").setLevel(logging.ERROR)
            folder = str(tmp_path_factory.mktemp("trl"))
            model, reference = (LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)) for _ in range(2))
            trainer = DPOTrainer(
                model,
                reference,
                args=DPOConfig(folder, bf16=False, use_cpu=True, report_to="none", max_length=max_length),
                train_dataset=rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
            )
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        return [tuple(row[column] for column in columns) for row in trainer.train_dataset]

    return tokenize
