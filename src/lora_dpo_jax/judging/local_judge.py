"""A judge of this machine: a model whose next token is A or B, whichever it finds likelier."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import jax
import numpy as np

from lora_dpo_jax.data.batches import packed_rows
from lora_dpo_jax.data.chat import ExampleTokenizer
from lora_dpo_jax.data.examples import TokenizedExample
from lora_dpo_jax.data.memory import MemoryExamples
from lora_dpo_jax.data.table import ExampleTable, whole_table
from lora_dpo_jax.judging.interface import Judge, JudgeConfig, Question, RunModels, Usage, Verdict
from lora_dpo_jax.judging.template import LETTER_ALONE, Template, messages_of
from lora_dpo_jax.log_probs import score_responses
from lora_dpo_jax.models import CausalLM
from lora_dpo_jax.models.quantization import QUANTIZATIONS
from lora_dpo_jax.places import refuse_impossible_paths
from lora_dpo_jax.platforms import jitted
from lora_dpo_jax.runs.systems import Dtype, ModelSystems
from lora_dpo_jax.settings.choices import check_choice
from lora_dpo_jax.sharding import on_host

LETTERS = ("A", "B")  # of the first answer and of the second


@JudgeConfig.register_subclass("local")
@dataclass(frozen=True)
class LocalJudgeConfig(JudgeConfig):
    """A model on this machine, which compares the log-probabilities of the letters A and B as its first token."""

    model: str  # folder or hub id of a base or merged model, or of an adapter that names its base
    adapter: str | None = None  # a PEFT folder (or hub id) on top of `model`
    tokenizer: str | None = None  # null: the adapter's if it has one, else the model's
    dtype: Dtype | None = None  # of the weights; null: f32 on CPU, bf16 on accelerators
    quantization: str = "none"  # of the weights: nf4, int8 or none
    template: str | None = None  # the path of a text with {prompt}, {first} and {second}, or of a Jinja template
    batch_size: int = 8  # rows computed together; bounds memory

    def __post_init__(self):
        names = ("model", "adapter", "tokenizer", "template")
        refuse_impossible_paths({name: getattr(self, name) for name in names})
        check_choice("quantization", self.quantization, QUANTIZATIONS)
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    def check(self, run: RunModels) -> None:
        Template.read("judge.template", self.template, LETTER_ALONE)
        self._systems()

    def start(self, run: RunModels) -> "LocalJudge":
        systems = self._systems()
        identity = {"type": "local", **systems.identities(run.cache / "digests")["judge.adapter"]}
        ((_, model),) = systems.models()
        template = Template.read("judge.template", self.template, LETTER_ALONE)
        return LocalJudge(model, systems.tokenizers["judge.adapter"], template, identity, rows=self.batch_size)

    def _systems(self) -> ModelSystems:
        return ModelSystems.find(
            ("judge.model", self.model),
            {"judge.adapter": self.adapter},
            tokenizer=("judge.tokenizer", self.tokenizer),
            dtype=self.dtype,
            quantization=self.quantization,
        )


class LocalJudge(Judge):
    """Prefers the answer whose letter is the likelier next token."""

    def __init__(
        self, model: CausalLM, tokenizer: Any, template: Template, identity: Mapping[str, Any], *, rows: int = 8
    ):
        """`rows` of packed questions are computed together."""
        self.model, self.tokenizer, self.template, self.rows = model, tokenizer, template, rows
        self._identity = {**identity, "template": template.text}
        self._encode = ExampleTokenizer(tokenizer).encode
        self._compiled = jitted(score_responses)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def verdicts(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        examples = [self._example(question) for question in questions]
        if not examples:
            return
        table = whole_table({"questions": MemoryExamples(examples, name="questions")})
        table = table.switching_at(self.model.config.switch_length)
        for indices, log_probs in self._scored(table):
            for index, (first, second) in zip(indices.tolist(), log_probs.tolist(), strict=True):
                preferred = "tie" if first == second else "first" if first > second else "second"
                reason = f"log p(A) = {first:.4f}, log p(B) = {second:.4f}"
                yield index, Verdict(preferred, reason, Usage(len(examples[index].prompt), 1))

    def _scored(self, table: ExampleTable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(int [question], float32 [question, letter]: log-probabilities) of each batch."""
        for batch in packed_rows(table, rows=self.rows, place=jax.device_put)[1]:
            micro = batch.micro_batch(0)
            ids, is_response = on_host(micro.examples.ids.array), on_host(micro.examples.is_response.array)
            log_probs = on_host(self._compiled(self.model, micro).log_probs.array)
            yield ids[ids >= 0], log_probs[is_response].reshape(-1, len(LETTERS))

    def _example(self, question: Question) -> TokenizedExample:
        """The question as a prompt, with each of the letters as a response of one token."""
        texts = [self._text(question) + letter for letter in LETTERS]
        first, second = self._encode(texts)
        prompt = commonprefix([first, second])
        if len(prompt) == len(first) or len(prompt) == len(second):
            raise ValueError(
                "judge.model: its tokenizer writes A and B with the same token, so it cannot tell them apart"
            )
        limit = self.model.config.max_position_embeddings
        if len(prompt) >= limit:
            raise ValueError(
                f"{question.prompt.origin}: the question has {len(prompt):,} tokens with both answers, and judge.model "
                f"reads at most {limit:,}. Leave the prompt out, or choose a judge that reads more"
            )
        letters = tuple(np.array([ids[len(prompt)]], np.int32) for ids in (first, second))
        return TokenizedExample(np.array(prompt, np.int32), letters, ())

    def _text(self, question: Question) -> str:
        text = self.template.render(question)
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.bos_token or ''}{text}"
        render: Any = self.tokenizer.apply_chat_template
        try:
            return render(messages_of(text), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and may raise any type
            raise ValueError(f"judge.model: its chat template rejects the question: {error}") from error
