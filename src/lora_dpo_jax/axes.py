"""The names of the axes of arrays, and which of them a mesh may split."""

# Of a batch. Its arrays are {micro, row, ...}; a step takes one micro-batch after the other.
MICRO = "micro"
ROW = "row"
POSITION = "position"  # tokens of a row
TARGET = "target"  # places of a row that a response token is predicted from
EXAMPLE = "example"
RESPONSE = "response"
COMPARISON = "comparison"

# Of weights and activations.
VOCAB = "vocab"
EMBED = "embed"
MLP = "mlp"
EXPERT = "expert"
KV_HEAD = "kv_head"
Q_HEADS_PER_GROUP = "q_heads_per_group"  # query heads that share a key-value head
QKV_HEAD = "qkv_head"  # heads of queries, keys and values in one matrix
GATE_UP = "gate_up"  # the two halves of a matrix that holds gate and up
HEAD_SIZE = "head_size"
HALF_HEAD = "half_head"  # the pairs of dimensions that rotary embeddings turn
KEY_POSITION = "key_position"  # what POSITION is called for keys and values
LAYERS = "layers"  # of one segment of a stack
RANK = "lora_rank"
TRAINED_TOKEN = "trained_token"  # tokens whose rows of the embedding are trained

# A mesh cannot split positions or the inside of a head: attention would be cut.
SPLITTABLE = frozenset({ROW, EMBED, MLP, KV_HEAD, Q_HEADS_PER_GROUP, VOCAB, RANK})
