from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from quill import discovery
from quill.config.settings import ModelConfig, SampleConfig
from quill.errors import DivergedError, InputError
from quill.generation import generator as module
from quill.generation.generator import Generator, generate, rows_at_once
from quill.model.gpt import GPT
from quill.tokenizers import base
from quill.tokenizers.base import Tokenizer

MakeModel = Callable[..., GPT]
Reciting = Callable[[Sequence[int]], GPT]
BLOCKS = discovery.names("model.blocks")
TEXT = "\n abcdefghijklmnopqrstuvwxyz."


@pytest.fixture
def characters() -> Tokenizer:
    return base.load("char").train([TEXT])


def greedy(**settings: Any) -> SampleConfig:
    return SampleConfig(temperature=0.0, **settings)


def recite(text: str, end: Sequence[int] = (256,)) -> list[int]:
    """Ids of a text without a repeated byte, so that each byte determines the next one."""
    ids = list(text.encode())
    assert len(set(ids)) == len(ids)
    return [*ids, *end]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5, "repetition_penalty": 1.2}, {"top_p": 0.9, "min_p": 0.01}]
)
def test_a_seed_gives_one_text_streamed_or_whole(
    make_model: MakeModel, characters: Tokenizer, block: str, settings: dict[str, Any]
) -> None:
    generator = Generator(make_model(block=block), characters)
    config = SampleConfig(seed=3, max_new_tokens=50, **settings)
    chunks = list(generator.stream("ab", config))
    assert "".join(chunks) == generator.generate("ab", config)[0]
    assert len("".join(chunks)) == 50
    assert all(chunks)
    again = Generator(make_model(block=block), characters)
    assert list(again.stream("ab", config)) == chunks


def test_a_sample_does_not_depend_on_the_number_of_samples(
    make_model: MakeModel, characters: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(make_model(), characters)
    config = SampleConfig(seed=3, max_new_tokens=40, num_samples=5)
    five = generator.generate("ab", config)
    assert len(set(five)) == 5
    assert generator.generate("ab", config.model_copy(update={"num_samples": 2})) == five[:2]
    monkeypatch.setattr(module, "rows_at_once", lambda config: 2)
    assert generator.generate("ab", config) == five


@pytest.mark.parametrize("block", BLOCKS)
def test_greedy_text_is_that_of_the_uncached_model(
    make_model: MakeModel, characters: Tokenizer, block: str
) -> None:
    model = make_model(block=block)
    ids = characters.encode("abc")
    for _ in range(13):
        ids.append(int(model.predict(torch.tensor([ids]), targets=False).argmax()))
    text = Generator(model, characters).generate("abc", greedy(max_new_tokens=13))[0]
    assert text == characters.decode(ids[3:])


def test_dropout_is_off_and_the_mode_is_kept(make_model: MakeModel, characters: Tokenizer) -> None:
    model = make_model(dropout=0.5)
    wanted = Generator(model, characters).generate("abc", greedy(max_new_tokens=40))
    model.train()
    generator = Generator(model, characters)
    assert generator.generate("abc", greedy(max_new_tokens=40)) == wanted
    assert list(generator.stream("abc", greedy(max_new_tokens=40))) == list(wanted[0])
    assert model.training


def test_streaming_leaves_the_caller_out_of_inference_mode(
    make_model: MakeModel, characters: Tokenizer
) -> None:
    threads = torch.get_num_threads()
    for _ in Generator(make_model(), characters).stream("a", SampleConfig(max_new_tokens=40)):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_f5_non_finite_weights_are_refused(make_model: MakeModel, characters: Tokenizer, bad: float) -> None:
    model = make_model()
    with torch.no_grad():
        model.wte.weight[:, 3] = bad
    generator = Generator(model, characters)
    for draw in (
        lambda: generator.generate("ab", SampleConfig()),
        lambda: list(generator.stream("", greedy())),
    ):
        with pytest.raises(DivergedError, match="NaN or infinity") as e:
            draw()
        assert e.value.exit_code == 6


def test_f22_characters_without_a_token_are_refused_or_skipped(
    make_model: MakeModel, characters: Tokenizer
) -> None:
    generator = Generator(make_model(), characters)
    with pytest.raises(InputError, match=r"É.*Z") as e:
        generator.generate("aÉZ", greedy())
    assert e.value.exit_code == 2
    with pytest.raises(InputError, match="É"):
        next(generator.stream("aÉ", greedy()))
    wanted = generator.generate("ab", greedy(max_new_tokens=5))
    assert generator.generate("aÉbZ", greedy(max_new_tokens=5), unknown="skip") == wanted
    assert "".join(generator.stream("aÉbZ", greedy(max_new_tokens=5), unknown="skip")) == wanted[0]


def test_f23_an_empty_prompt_starts_after_a_newline(make_model: MakeModel, characters: Tokenizer) -> None:
    generator = Generator(make_model(), characters)
    wanted = generator.generate("\n", greedy(max_new_tokens=20))
    assert generator.generate("", greedy(max_new_tokens=20)) == wanted
    assert generator.generate("É", greedy(max_new_tokens=20), unknown="skip") == wanted
    assert "".join(generator.stream("", greedy(max_new_tokens=20))) == wanted[0]


def test_f23_an_empty_prompt_of_a_vocabulary_without_newlines(make_model: MakeModel) -> None:
    letters = base.load("char").train(["abcdefgh"])
    generator = Generator(make_model(vocab_size=8), letters)
    assert generator.generate("", greedy(max_new_tokens=9)) == generator.generate(
        "a", greedy(max_new_tokens=9)
    )


def test_f23_a_prompt_beyond_the_context_is_cut_with_a_notice(
    make_model: MakeModel, characters: Tokenizer
) -> None:
    notices: list[str] = []
    generator = Generator(make_model(), characters, notices.append)
    fits = "the rain in spai"
    wanted = generator.generate(fits, greedy(max_new_tokens=20))
    assert notices == []
    assert generator.generate("heard all night long " + fits, greedy(max_new_tokens=20)) == wanted
    assert "".join(generator.stream("heard all night long " + fits, greedy(max_new_tokens=20))) == wanted[0]
    assert len(notices) == 2
    assert "last 16 tokens" in notices[0]
    assert "16" in notices[0]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 5.0, "seed": 2}, {"top_k": 40}])
def test_rows_of_the_embedding_without_a_token_are_never_drawn(
    make_model: MakeModel, characters: Tokenizer, settings: dict[str, Any]
) -> None:
    model = make_model(vocab_size=64, tie_embeddings=False)
    with torch.no_grad():
        # Without the tokenizer's limit, nearly every draw would be one of these.
        model.lm_head.weight[characters.vocab_size :] *= 100
    texts = Generator(model, characters).generate("abc", num_samples=4, max_new_tokens=40, **settings)
    assert [len(text) for text in texts] == [40] * 4


def test_f24_zero_new_tokens_give_no_text(make_model: MakeModel, characters: Tokenizer) -> None:
    generator = Generator(make_model(), characters)
    assert list(generator.stream("a", SampleConfig(max_new_tokens=0))) == []
    assert generator.generate("a", SampleConfig(max_new_tokens=0, num_samples=3)) == ["", "", ""]


def test_f25_chunks_are_whole_characters(reciting: Reciting, by_bytes: Tokenizer) -> None:
    text = "aé€😀z"
    generator = Generator(reciting(recite(text)), by_bytes)
    assert list(generator.stream("a", greedy())) == ["é", "€", "😀", "z"]
    assert generator.generate("a", greedy(num_samples=2)) == [text[1:]] * 2


def test_f25_an_incomplete_character_appears_only_at_the_end(reciting: Reciting, by_bytes: Tokenizer) -> None:
    generator = Generator(reciting([*b"ab", 0xF0, 0x9F, 256]), by_bytes)
    assert list(generator.stream("a", greedy())) == ["b", "\ufffd"]
    assert list(generator.stream("a", greedy(max_new_tokens=2))) == ["b", "\ufffd"]
    assert generator.generate("a", greedy()) == ["b\ufffd"]


def test_the_end_of_text_token_ends_a_sample(reciting: Reciting, by_bytes: Tokenizer) -> None:
    generator = Generator(reciting(recite("abcd", (256, ord("x")))), by_bytes)
    assert list(generator.stream("a", greedy())) == ["b", "c", "d"]
    assert generator.generate("a", greedy(num_samples=2)) == ["bcd", "bcd"]


def test_samples_end_independently(reciting: Reciting, by_bytes: Tokenizer) -> None:
    model = reciting(recite("bcdefg"))
    with torch.no_grad():
        model.wte.weight[ord("a"), [ord("b"), ord("f")]] = 1000.0
    texts = Generator(model, by_bytes).generate("a", SampleConfig(num_samples=30, seed=0))
    assert set(texts) == {"bcdefg", "fg"}


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        (["d"], ["b", "c"]),
        (["cd"], ["b"]),
        (["ce"], ["b", "cd", "e"]),
        (["e", "bc"], []),
        (["de", "zzz"], ["b", "c"]),
        (["ex"], ["b", "c", "d", "e"]),
    ],
)
def test_stop_strings(reciting: Reciting, by_bytes: Tokenizer, stop: list[str], wanted: list[str]) -> None:
    generator = Generator(reciting(recite("abcde")), by_bytes)
    assert list(generator.stream("a", greedy(stop=stop))) == wanted
    assert generator.generate("a", greedy(stop=stop, num_samples=2)) == ["".join(wanted)] * 2


def test_a_stop_string_in_the_prompt_does_not_count(reciting: Reciting, by_bytes: Tokenizer) -> None:
    generator = Generator(reciting(recite("abcde")), by_bytes)
    assert generator.generate("ab", greedy(stop=["b", "ab"])) == ["cde"]


def test_an_empty_stop_string_is_refused(make_model: MakeModel, characters: Tokenizer) -> None:
    generator = Generator(make_model(), characters)
    for draw in (generator.generate, lambda *a: list(generator.stream(*a))):
        with pytest.raises(InputError, match="stop"):
            draw("a", SampleConfig(stop=[""]))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("new_tokens", [5, 50])
def test_generate_continues_ids(make_model: MakeModel, block: str, new_tokens: int) -> None:
    model = make_model(block=block).train()
    idx = torch.randint(0, 29, (3, 4))
    out = generate(model, idx, new_tokens, 0.8, 5, seed=1)
    assert out.shape == (3, 4 + new_tokens)
    assert torch.equal(out[:, :4], idx)
    assert torch.equal(out, generate(model, idx, new_tokens, 0.8, 5, seed=1))
    assert not torch.equal(out, generate(model, idx, new_tokens, 0.8, 5, seed=2))
    assert torch.equal(generate(model, idx, 0), idx)
    assert model.training


def test_generate_is_greedy_at_temperature_0(make_model: MakeModel) -> None:
    model = make_model()
    idx = torch.randint(0, 29, (2, 4))
    out = generate(model, idx, 12, temperature=0.0)
    for t in range(4, 16):
        assert torch.equal(out[:, t], model.predict(out[:, :t], targets=False).argmax(-1))


def test_generate_refuses_invalid_settings(make_model: MakeModel) -> None:
    with pytest.raises(InputError, match="temperature"):
        generate(make_model(), torch.zeros(1, 1, dtype=torch.long), 5, temperature=-1.0)


def test_samples_side_by_side_fit_in_memory() -> None:
    tiny = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=9).shape()
    gpt2 = ModelConfig(
        block="gpt2", n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257
    ).shape()
    vast = ModelConfig(n_layer=100, n_head=100, n_embd=12800, block_size=2**20, vocab_size=9).shape()
    assert rows_at_once(tiny) == 256
    assert 4 <= rows_at_once(gpt2) <= 8
    assert rows_at_once(vast) == 1
    assert rows_at_once(ModelConfig(n_layer=0, vocab_size=9).shape()) == 256
