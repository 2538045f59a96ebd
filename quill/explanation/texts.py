"""What a beginner should know of each step, chosen for the model at hand, with sources."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from quill.config import blocks
from quill.model.gpt import GPT


@dataclass(frozen=True)
class Text:
    """A short explanation.

    Attributes:
        title: Heading.
        body: Plain sentences.
        sources: Papers by name and year.
    """

    title: str
    body: str
    sources: tuple[str, ...] = ()


def texts(model: GPT) -> dict[str, Text]:
    """The explanations by what they are about."""
    if model.shape.n_layer == 0:
        return {"model": _BIGRAM, "tokens": _TOKENS, "sampling": _SAMPLING, "training": _TRAINING}
    return {
        "model": _model(model),
        "tokens": _TOKENS,
        "embedding": _embedding(model),
        "attention": _attention(model),
        "softmax": _SOFTMAX,
        "mlp": _mlp(model),
        "residual": _residual(model),
        "lens": _LENS,
        "contributions": _CONTRIBUTIONS,
        "sampling": _SAMPLING,
        "training": _TRAINING,
    }


def _model(model: GPT) -> Text:
    c = model.shape
    head = (
        "The head reuses the embedding table, so it has no parameters of its own."
        if c.tie_embeddings
        else "The head has a matrix of its own."
    )
    return Text(
        "The model",
        "A decoder-only transformer reads tokens from left to right. Each token becomes a vector of "
        f"{c.n_embd} numbers; {c.n_layer} block{'s' * (c.n_layer != 1)} in a row add to that vector; the "
        f"head turns the last vector into one score for each of the {c.vocab_size:,} tokens. {head}",
        ("Vaswani et al. 2017, Attention Is All You Need", "Radford et al. 2019, GPT-2")
        + (("Press and Wolf 2017, Using the Output Embedding",) if c.tie_embeddings else ()),
    )


def _embedding(model: GPT) -> Text:
    c = model.shape
    start = "Row i of the embedding table is the vector of token i. It is learned like every other weight. "
    if blocks.facts(c.block).positions == "learned":
        return Text(
            "Embedding and positions",
            start + "Attention alone does not know the order of the tokens, so a second table has a learned "
            f"vector for each of the {c.block_size} positions, which is added to the token's vector.",
            ("Bengio et al. 2003, A Neural Probabilistic Language Model", "Radford et al. 2019, GPT-2"),
        )
    return Text(
        "Embedding and positions",
        start + "Attention alone does not know the order of the tokens. This model adds nothing to the "
        "embeddings: inside each head it rotates queries and keys by angles that grow with the position, so "
        "that their product depends on how far two tokens are apart.",
        ("Bengio et al. 2003, A Neural Probabilistic Language Model", "Su et al. 2021, RoFormer"),
    )


def _attention(model: GPT) -> Text:
    c = model.shape
    shared = c.n_head // c.n_kv_head
    sources = ["Vaswani et al. 2017, Attention Is All You Need"]
    grouped = ""
    if shared > 1:
        grouped = f" Every {shared} heads share one set of keys and values."
        sources.append("Ainslie et al. 2023, GQA")
    sources += [
        "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks",
        "Jain and Wallace 2019, Attention is not Explanation",
    ]
    return Text(
        "Attention",
        f"In each block, {c.n_head} head{'s' * (c.n_head != 1)} let a token read from itself and the tokens "
        "before it. A row of the map is a token that reads, a column is a token that is read, and a row sums "
        f"to 1. Later tokens are hidden: when text is generated they do not exist yet.{grouped} Many heads "
        "rest on the first token when they have nothing to read. A large weight says where a head looks, not "
        "how much that changes the result.",
        tuple(sources),
    )


def _mlp(model: GPT) -> Text:
    c = model.shape
    gated = c.activation in blocks.facts(c.block).gated
    made = (
        f"each hidden unit is a value times a gate ({c.activation})"
        if gated
        else f"each hidden unit is a weighted sum through the nonlinearity {c.activation}"
    )
    return Text(
        "MLP",
        f"The MLP works on each token alone. It widens the vector from {c.n_embd} to {c.mlp_size} hidden "
        f"units, where {made}, and narrows it again. A unit can be read as a pattern that it detects, and "
        "its outgoing weights as what it then writes into the vector.",
        ("Geva et al. 2021, Transformer Feed-Forward Layers Are Key-Value Memories",)
        + (("Shazeer 2020, GLU Variants Improve Transformer",) if gated else ()),
    )


def _residual(model: GPT) -> Text:
    rms = isinstance(model.ln_f, nn.RMSNorm)
    norm = (
        "divides it by its root mean square"
        if rms
        else "subtracts its mean and divides it by its standard deviation"
    )
    return Text(
        "Residual stream",
        "Attention and MLP replace nothing: what they compute is added to the token's vector, which runs "
        f"through all blocks as a stream. Before each of them a norm {norm}, because the stream grows. The "
        "bars show the length of the vector and of what is added to it.",
        (
            "He et al. 2016, Deep Residual Learning",
            "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
            "Zhang and Sennrich 2019, Root Mean Square Layer Normalization"
            if rms
            else "Ba et al. 2016, Layer Normalization",
        ),
    )


_BIGRAM = Text(
    "The model",
    "This model is a table. Row i has a score for each token that may follow token i, so it looks at the "
    "last token and nothing else. It is the simplest language model, and what a transformer has to beat.",
    ("Shannon 1948, A Mathematical Theory of Communication",),
)
_TOKENS = Text(
    "Tokens",
    "The tokenizer cuts the prompt into tokens and gives each the number of its row in the tables. A "
    "space is shown as ␣, a line break as ⏎.",
    ("Sennrich et al. 2016, Neural Machine Translation of Rare Words with Subword Units",),
)
_SOFTMAX = Text(
    "One query in numbers",
    "The query of the reading token is multiplied with the key of each token. The product is scaled, so "
    "that it does not grow with the width of a head, and softmax turns the scores into weights: e to the "
    "power of the score, divided by the sum over all tokens that may be read. The head's result is the "
    "sum of the values, each times its weight.",
    ("Vaswani et al. 2017, Attention Is All You Need",),
)
_LENS = Text(
    "Logit lens",
    "What would the model say if it ended here? The vector after each block goes through the last norm "
    "and the head, as only the last one was trained to. So the last row is what the model says, and the "
    "rows before it are a reading, not what the model thinks: a block may keep what it knows in a form "
    "that the head cannot read yet.",
    (
        "nostalgebraist 2020, interpreting GPT: the logit lens",
        "Belrose et al. 2023, Eliciting Latent Predictions with the Tuned Lens",
    ),
)
_CONTRIBUTIONS = Text(
    "Who raised it",
    "The last vector is a sum of what all parts have added, so the score of a token is a sum too. A bar "
    "shows how much a part raises or lowers the score of the chosen token against the mean of all "
    "tokens. The scale of the last norm is taken as it is for this prompt. Indirect effects, such as a "
    "head that another one reads from, are not in a head's own bar.",
    ("Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",),
)
_SAMPLING = Text(
    "The next token",
    "The scores (logits) are divided by the temperature; top-k keeps the k likeliest tokens, top-p the "
    "fewest of them whose probabilities add up to p; softmax makes probabilities of what is left, and "
    "the next token is drawn from them. It is appended to the prompt, and everything starts again.",
    (
        "Ackley et al. 1985, A Learning Algorithm for Boltzmann Machines",
        "Fan et al. 2018, Hierarchical Neural Story Generation",
        "Holtzman et al. 2020, The Curious Case of Neural Text Degeneration",
    ),
)
_TRAINING = Text(
    "What training would say",
    "In training the model predicts every token of a text from those before it. Its surprise about a "
    "token is minus the logarithm of the probability that it gave it; the mean is the loss, and each "
    "step moves all weights a little in the direction that lowers it.",
    (
        "Rumelhart et al. 1986, Learning Representations by Back-propagating Errors",
        "Radford et al. 2019, GPT-2",
    ),
)
