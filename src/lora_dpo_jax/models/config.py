"""The features in which decoder architectures differ, as fields, and the axes that follow from them."""

from dataclasses import dataclass

from haliax import Axis

from lora_dpo_jax.axes import EMBED, HEAD_SIZE, KV_HEAD, MLP, Q_HEADS_PER_GROUP, VOCAB
from lora_dpo_jax.models.rope import RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with rotary positions and a gated MLP. Sizes are counts, windows are tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] | None = None  # one per layer, None = full attention

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        least = 4 if self.rope.type == "dynamic" else 2  # `dynamic` divides by head_dim - 2
        if self.head_dim % 2 or self.head_dim < least:
            raise ValueError(
                f"head_dim={self.head_dim} (by default: hidden_size / num_attention_heads) must be even and "
                f"at least {least}: rotary embeddings rotate pairs of dimensions"
            )
        if self.sliding_windows is not None and len(self.sliding_windows) != self.num_layers:
            raise ValueError(f"{len(self.sliding_windows)} sliding windows for {self.num_layers} layers")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer in tokens; None = full attention."""
        return self.sliding_windows or (None,) * self.num_layers

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
    def HeadSize(self) -> Axis:
        return Axis(HEAD_SIZE, self.head_dim)
