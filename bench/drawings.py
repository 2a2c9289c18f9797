"""Drawings of how the library works: a packed row, the adapters beside the weights, the way from data to a decision."""

from bench.svg import Canvas

KINDS = ("prompt", "chosen", "rejected")
# Two pairs in tokens, as the drawing has them: prompt, chosen, rejected.
PAIRS = ((4, 3, 3), (3, 2, 3))
LONGEST = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in PAIRS)
CELL = 15.0


def packed_row() -> Canvas:
    """Two pairs padded as four sequences; the same in one row; and who attends to whom in it."""
    tokens = [token for pair in range(len(PAIRS)) for token in _tokens_of(pair)]
    padded = 2 * len(PAIRS) * LONGEST
    canvas = Canvas(
        400,
        590,
        "A packed row with shared prompts, and who attends to whom in it",
        "Above, two preference pairs as four padded sequences: each prompt stands twice, and the shorter sequences are "
        f"filled up, so they take {padded} positions. Below, the same pairs in one row of {len(tokens)} positions: "
        "prompt, chosen, rejected of pair A, then those of pair B. Under the row, a square with a line for each token. "
        "A prompt token sees its prompt up to itself. A chosen token sees its prompt, and the chosen response up to "
        "itself. A rejected token sees its prompt, and the rejected response up to itself, and nothing of the chosen "
        "one. No token of a pair sees the other pair.",
    )
    _legend(canvas, 16)
    canvas.text(8, 52, f"Padded, each prompt twice: {padded} positions", weight=600)
    _padded(canvas, 62)
    canvas.text(8, 160, f"Packed, each prompt once: {len(tokens)} positions", weight=600)
    left = 400 - CELL * len(tokens) - 8
    _row(canvas, tokens, left, 190)
    canvas.text(8, 244, "Who attends to whom", weight=600)
    _mask(canvas, tokens, left, 278)
    return canvas


def _tokens_of(pair: int) -> list[tuple[int, str]]:
    return [(pair, kind) for kind, size in zip(KINDS, PAIRS[pair], strict=True) for _ in range(size)]


def _legend(canvas: Canvas, y: float) -> None:
    for x, name in ((8, "prompt"), (96, "chosen"), (184, "rejected"), (280, "pad")):
        canvas.rect(x, y - 11, 13, 13, name, "muted" if name == "pad" else f"{name}_edge", dashed=name == "pad")
        canvas.text(x + 19, y, "padding" if name == "pad" else name)


def _padded(canvas: Canvas, top: float) -> None:
    rows = [
        (pair, kind, sizes[0], n)
        for pair, sizes in enumerate(PAIRS)
        for kind, n in zip(KINDS[1:], sizes[1:], strict=True)
    ]
    for number, (pair, kind, prompt, answer) in enumerate(rows):
        y = top + number * (CELL + 4)
        canvas.text(8, y + 12, f"{'AB'[pair]}, {kind}", "muted", size=12)
        for place in range(LONGEST):
            name = "prompt" if place < prompt else kind if place < prompt + answer else "pad"
            edge = "muted" if name == "pad" else f"{name}_edge"
            canvas.rect(122 + place * CELL, y, CELL - 1, CELL - 1, name, edge, radius=2, dashed=name == "pad")


def _row(canvas: Canvas, tokens: list[tuple[int, str]], left: float, top: float) -> None:
    """The row, with the rotary position of each token: a rejected response begins where its prompt ended."""
    place = 0
    for pair, sizes in enumerate(PAIRS):
        canvas.text(left + place * CELL, top - 8, f"pair {'AB'[pair]}", "muted", size=12)
        starts = (0, sizes[0], sizes[0])
        for kind, size, start in zip(KINDS, sizes, starts, strict=True):
            for n in range(size):
                canvas.rect(left + place * CELL, top, CELL - 1, 22, kind, f"{kind}_edge", radius=2)
                canvas.text(left + (place + 0.45) * CELL, top + 15.5, str(start + n), size=11, anchor="middle")
                place += 1
    canvas.text(8, top + 16, "positions", "muted", size=12)


def _mask(canvas: Canvas, tokens: list[tuple[int, str]], left: float, top: float) -> None:
    side = CELL * len(tokens)
    canvas.text(left, top - 10, "tokens that are seen", "muted", size=12)
    canvas.rect(left - 0.5, top - 0.5, side, side, "none", "rule", radius=0)
    for q, (pair, kind) in enumerate(tokens):
        for k, (other, branch) in enumerate(tokens[: q + 1]):
            if pair == other and branch in ("prompt", kind):
                canvas.rect(left + k * CELL, top + q * CELL, CELL - 1, CELL - 1, branch, f"{branch}_edge", radius=2)
        if q == 0 or tokens[q - 1] != tokens[q]:
            size = sum(token == tokens[q] for token in tokens)
            canvas.text(left - 8, top + (q + size / 2) * CELL + 3, f"{kind} {'AB'[pair]}", size=12, anchor="end")
            if q:
                canvas.line(left - 96, top + q * CELL - 1, left, top + q * CELL - 1)
    canvas.text(left, top + side + 18, "blank: not computed", "muted", size=12)


def adapters() -> Canvas:
    """Policy and reference as two trees over the same frozen array."""
    canvas = Canvas(
        400,
        372,
        "Policy and reference share the frozen weights",
        "Two trees. The policy, loraize of the model, has a LoraLinear at q_proj: it holds the wrapped Linear and two "
        "small matrices, lora_A and lora_B, which alone are trained. The reference, unwrap_lora of the policy, has the "
        "plain Linear at q_proj. Arrows from both lead to one array, the weight W: frozen, one copy in memory, with no "
        "gradient and no optimizer state.",
    )
    canvas.rect(8, 8, 224, 218, "panel", "rule", radius=8)
    canvas.text(20, 30, "policy", weight=700)
    canvas.text(20, 48, "loraize(model)", "muted", size=12, mono=True)
    canvas.rect(20, 62, 200, 152, "none", "muted", radius=6)
    canvas.text(30, 82, "q_proj: LoraLinear", size=12.5, mono=True)
    _box(canvas, 30, 94, 180, "wrapped: Linear", "pad", "muted")
    _box(canvas, 30, 132, 180, "lora_A  r × in", "chosen", "chosen_edge")
    _box(canvas, 30, 170, 180, "lora_B  out × r", "chosen", "chosen_edge")
    canvas.rect(250, 8, 142, 130, "panel", "rule", radius=8)
    canvas.text(262, 30, "reference", weight=700)
    canvas.text(262, 48, "unwrap_lora", "muted", size=12, mono=True)
    canvas.text(262, 82, "q_proj:", size=12.5, mono=True)
    _box(canvas, 262, 94, 118, "Linear", "pad", "muted")
    canvas.rect(88, 272, 224, 58, "prompt", "prompt_edge", radius=6)
    canvas.text(200, 296, "W  out × in, frozen", anchor="middle", weight=600)
    canvas.text(200, 317, "one copy, no gradient, no state", anchor="middle", size=12)
    canvas.arrow([(30, 109), (14, 109), (14, 250), (140, 250), (140, 272)], "prompt_edge")
    canvas.arrow([(366, 124), (366, 250), (260, 250), (260, 272)], "prompt_edge")
    canvas.rect(262, 166, 13, 13, "chosen", "chosen_edge")
    canvas.text(281, 177, "trained,", size=12)
    canvas.text(281, 193, "float32", size=12)
    canvas.text(200, 358, "policy: y = W x + (alpha / r) B A x", size=12.5, anchor="middle", mono=True)
    return canvas


def _box(canvas: Canvas, x: float, y: float, width: float, words: str, fill: str, edge: str) -> None:
    canvas.rect(x, y, width, 30, fill, edge, radius=5)
    canvas.text(x + 10, y + 20, words, size=12.5, mono=True)


# The way of a project: what is done, and what one has then.
STAGES = (
    ("Data", "pairs, ranked answers, labels", "prompt"),
    ("Look", "preview the tokens; plan memory and time", "panel"),
    ("Train", "adapters alone; killed runs resume exactly", "chosen"),
    ("Evaluate", "held-out accuracy, completions, a judge", "panel"),
    ("Decide", "which step, is it better, what changed", "prompt"),
)


def flow() -> Canvas:
    """From data to a decision."""
    canvas = Canvas(
        400,
        474,
        "From data to a decision",
        "Five stages, one below the other: "
        + "; ".join(f"{name}: {what}" for name, what, _ in STAGES)
        + ". From Decide one way leads back to Data, with new pairs of the model's own answers, and one way leads on, "
        "to an adapter for PEFT and vLLM, a merged model for transformers, or a GGUF file for llama.cpp.",
    )
    for number, (name, what, fill) in enumerate(STAGES):
        y = 8 + number * 78
        canvas.rect(8, y, 316, 54, fill, f"{fill}_edge" if fill in KINDS else "muted", radius=8)
        canvas.text(22, y + 22, name, weight=700)
        canvas.text(22, y + 42, what, size=12.5)
        canvas.arrow([(166, y + 54), (166, y + 77)])
    canvas.arrow([(324, 347), (362, 347), (362, 35), (325, 35)])
    canvas.text(356, 78, "new pairs of its own answers", "muted", size=12, anchor="end")
    canvas.rect(8, 398, 384, 62, "none", "muted", radius=8)
    canvas.text(22, 420, "Use it", weight=700)
    canvas.text(22, 444, "PEFT or vLLM adapter, merged model, GGUF", size=12.5)
    return canvas
