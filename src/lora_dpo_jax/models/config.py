"""The features in which decoder architectures differ, as fields, and the axes that follow from them."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from haliax import Axis

from lora_dpo_jax.axes import EMBED, EXPERT, HEAD_SIZE, KV_HEAD, MLP, Q_HEADS_PER_GROUP, QKV_HEAD, VOCAB
from lora_dpo_jax.models.gates import ClampedGate
from lora_dpo_jax.models.norms import NormKind
from lora_dpo_jax.models.rope import RopeConfig


@dataclass(frozen=True)
class LayerNorms:
    """Where a layer has norms, by their names in tensor names; None = no norm there."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None  # before its output is added to the residual stream
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts in the place of the MLP: their number and size, how a router chooses, their names in tensor names."""

    num_experts: int
    per_token: int
    intermediate_size: int
    normalizes: bool = False  # the weights of a token's experts sum to one
    reports_balance: bool = False  # layers report BALANCE, for the auxiliary loss of a run
    block_name: str = "mlp"
    router_name: str = "gate"
    matrix_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    # One array and one tensor hold the gates and up-projections of all experts, and one their down-projections: the
    # parameters of transformers 5. Otherwise, each matrix of each expert has a name and an adapter of its own.
    gathered: bool = False
    is_interleaved: bool = False  # the rows of a gathered tensor are gate, up, gate, up, ...
    is_transposed: bool = False  # files hold each matrix of a gathered tensor as {in, out}
    has_biases: bool = False  # of the router and the experts
    clamped_gate: ClampedGate | None = None  # in the place of activation(gate) * up

    def __post_init__(self):
        if self.per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.per_token} is more than the number of experts, num_experts or "
                f"num_local_experts={self.num_experts}"
            )

    @property
    def module_name(self) -> str:
        """The part of tensor names for the router and the experts. transformers 5 calls all of them mlp."""
        return "mlp" if self.gathered else self.block_name

    @property
    def Expert(self) -> Axis:
        return Axis(EXPERT, self.num_experts)

    @property
    def Mlp(self) -> Axis:
        return Axis(MLP, self.intermediate_size)


@dataclass(frozen=True)
class LayerKind:
    """The features in which the layers of one decoder may differ. Layers of equal kinds share a compiled program."""

    window: int | None = None  # tokens; None = full attention
    rope: RopeConfig | None = RopeConfig()  # None = no rotary positions
    has_experts: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder with rotary positions and a gated MLP. Sizes are counts, windows are tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    layer_ropes: tuple[RopeConfig | None, ...] | None = None  # one per layer; None = `rope` in every layer
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norms: LayerNorms = LayerNorms()
    activation: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False  # q, k and v are rows of one matrix
    fused_gate_up: bool = False
    qk_norm: Literal["head", "projection"] | None = None  # over each head, or over all heads together
    parallel: bool = False  # the MLP reads what attention reads, and both are added at once
    sliding_windows: tuple[int | None, ...] | None = None  # one per layer, None = full attention
    experts: ExpertsConfig | None = None
    expert_layers: tuple[bool, ...] | None = None  # one per layer; None = experts in every layer, if there are any
    attention_scale: float | None = None  # of products q.k; None = 1 / sqrt(head_dim)
    attention_softcap: float | None = None  # see ScoreRule
    attention_sinks: bool = False  # see ScoreRule
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer adds to the residual stream
    logit_scale: float = 1.0
    logit_softcap: float | None = None  # logits = softcap * tanh(logits / softcap)
    has_wrapper: bool = False  # it is the text model of a model of text and images

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        for rope in self.ropes:
            rope.check(self.head_dim)
        for name in ("sliding_windows", "layer_ropes", "expert_layers"):
            of_layers = getattr(self, name)
            if of_layers is not None and len(of_layers) != self.num_layers:
                raise ValueError(f"{len(of_layers)} {name.replace('_', ' ')} for {self.num_layers} layers")

    def with_gathered_experts(self) -> "DecoderConfig":
        """The same model with gathered experts, as `lora.target_parameters` needs them. It must have experts."""
        assert self.experts is not None
        return dataclasses.replace(self, experts=dataclasses.replace(self.experts, gathered=True))

    @property
    def num_expert_layers(self) -> int:
        return sum(kind.has_experts for kind in self.layers)

    @property
    def layers(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        windows = self.sliding_windows or (None,) * self.num_layers
        ropes = (self.rope,) * self.num_layers if self.layer_ropes is None else self.layer_ropes
        experts = (self.experts is not None,) * self.num_layers if self.expert_layers is None else self.expert_layers
        return tuple(map(LayerKind, windows, ropes, experts))

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary settings that layers use, each once."""
        found = (self.rope,) if self.layer_ropes is None else self.layer_ropes
        return tuple(dict.fromkeys(rope for rope in found if rope is not None))

    @property
    def switch_length(self) -> int | None:
        """The number of tokens beyond which all tokens of a sequence are rotated otherwise, if there is one."""
        lengths = {rope.original_max_position_embeddings for rope in self.ropes if rope.type == "longrope"}
        return min(lengths, default=None)

    @property
    def Vocab(self) -> Axis:
        return Axis(VOCAB, self.vocab_size)

    @property
    def Embed(self) -> Axis:
        return Axis(EMBED, self.hidden_size)

    @property
    def Mlp(self) -> Axis:
        return Axis(MLP, self.intermediate_size)

    @property
    def KVHeads(self) -> Axis:
        return Axis(KV_HEAD, self.num_kv_heads)

    @property
    def QHeadsPerGroup(self) -> Axis:
        return Axis(Q_HEADS_PER_GROUP, self.num_heads // self.num_kv_heads)

    @property
    def QKVHeads(self) -> Axis:
        """All query heads, then those of keys, then those of values."""
        return Axis(QKV_HEAD, self.num_heads + 2 * self.num_kv_heads)

    @property
    def HeadSize(self) -> Axis:
        return Axis(HEAD_SIZE, self.head_dim)
