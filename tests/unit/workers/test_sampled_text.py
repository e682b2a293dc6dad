"""Text of tokens as they come, and stop strings in it, for each kind of tokenizer."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
from harness.tokenizers_of_kinds import END, byte_level, sentence_piece, words
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tensafe.wire.status import TenSafeFault
from workers.engine.sampling.stops import StopRule
from workers.engine.sampling.text import TextStream
from workers.operations import Stop

KINDS = {"bytes": byte_level(), "pieces": sentence_piece()}
TEXTS = st.text(
    st.one_of(st.sampled_from("stop a.\n!"), st.characters(codec="utf-8", exclude_characters="▁")),
    max_size=40,
)


def model(tokenizer, end_tokens=frozenset()):
    return SimpleNamespace(name="tiny", tokenizer=tokenizer, end_tokens=end_tokens)


def decode(tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=150)
@given(prompt=TEXTS, text=TEXTS)
@example(prompt="", text=" a")
@example(prompt="x", text="é" * 30)
@example(prompt="stop", text="\n\n  a")
def test_the_pieces_of_a_text_are_the_text(kind, prompt, text):
    tokenizer = KINDS[kind]
    before = tokenizer(prompt)["input_ids"]
    tokens = tokenizer(prompt + text)["input_ids"]
    if tokens[: len(before)] != before:  # a token over the border: no completion of this prompt
        before, tokens = [], tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer, before)
    pieces = [stream.add(token) for token in tokens[len(before) :]]
    whole = "".join(pieces) + stream.finish()
    assert decode(tokenizer, before) + whole == decode(tokenizer, tokens)
    # No piece has half of a character.
    if "\ufffd" not in decode(tokenizer, tokens):
        assert "\ufffd" not in "".join(pieces)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 250), max_size=60))
def test_any_bytes_come_out_as_they_do_at_once(tokens):
    """What a model that was not trained yet gives: mostly no characters at all."""
    tokenizer = KINDS["bytes"]
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == decode(tokenizer, tokens)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 256), max_size=20))
def test_bytes_that_are_no_characters_do_not_reach_beyond_themselves(noise):
    """Such decoders change what they gave for a run of bytes when it turns out to be none."""
    tokenizer = KINDS["pieces"]
    stream = TextStream(tokenizer, tokenizer("go")["input_ids"])
    for token in noise:
        stream.add(token)
    good = tokenizer(" stop. a stop.")["input_ids"][1:]
    assert "".join(map(stream.add, good)).endswith(decode(tokenizer, good))


def test_a_character_that_the_prompt_leaves_unfinished_is_the_completions():
    tokenizer = KINDS["bytes"]
    euro = tokenizer("€")["input_ids"]
    assert len(euro) == 3
    stream = TextStream(tokenizer, euro[:2])
    assert stream.add(euro[2]) == "€"
    # Not finished after all: the mark stays with the prompt.
    stream = TextStream(tokenizer, euro[:2])
    assert stream.add(tokenizer("!")["input_ids"][0]) == "!"


def test_a_space_at_the_beginning_is_kept():
    tokenizer = KINDS["pieces"]
    prompt = tokenizer("go.")["input_ids"]
    (piece,) = tokenizer.convert_tokens_to_ids(["▁stop"])
    assert decode(tokenizer, [piece]) == "stop"
    assert TextStream(tokenizer, prompt).add(piece) == " stop"


def test_special_tokens_give_no_text():
    tokenizer = KINDS["bytes"]
    stream = TextStream(tokenizer, tokenizer("a")["input_ids"])
    assert stream.add(tokenizer.eos_token_id) == ""
    assert stream.add(tokenizer("b")["input_ids"][0]) == "b"


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, [1, 2])
    assert stream.add(3) + stream.finish() == ""
    with pytest.raises(TenSafeFault, match="no tokenizer"):
        StopRule(model(None), Stop(strings=("x",)))
    assert StopRule(model(None), Stop(tokens=(3,))).is_end_token(3)


def stopped(tokenizer, text: str, stops: tuple[str, ...]) -> tuple[str, str, int]:
    """The text until a stop string, all that could have been told meanwhile, and the number of
    tokens that it took."""
    rule, stream = StopRule(model(tokenizer), Stop(strings=stops)), TextStream(tokenizer, [])
    seen, told, count = "", "", 0
    for token in tokenizer(text)["input_ids"]:
        fresh = stream.add(token)
        seen += fresh
        count += 1
        end = rule.find(seen, len(fresh))
        if end is not None:
            return seen[:end], told, count
        told = seen[: len(seen) - rule.held_back(seen)]
    return seen + stream.finish(), told, count


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=200)
@given(
    text=TEXTS,
    stops=st.lists(st.text("stop a.é\n", min_size=1, max_size=5), min_size=1, max_size=3),
)
@example(text="astop", stops=["stop"])
@example(text="aaaab", stops=["aab"])
@example(text="caféé", stops=["é"])
@example(text="st\nsto\nstop", stops=["stop", "o\ns"])
def test_a_stop_string_ends_the_text_before_it_wherever_tokens_end(kind, text, stops):
    tokenizer = KINDS[kind]
    whole = decode(tokenizer, tokenizer(text)["input_ids"])
    cut, told, count = stopped(tokenizer, text, tuple(stops))
    found = [place for stop in stops if (place := whole.find(stop)) >= 0]
    # The first to be complete ends it; another may begin before that and end later.
    if not found:
        assert cut == whole
    else:
        ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
        assert not any(stop in cut for stop in stops)
        assert len(cut) < min(ends)
        assert whole.startswith(cut)
        # No more tokens than it took to complete it.
        tokens = tokenizer(text)["input_ids"]
        assert any(stop in decode(tokenizer, tokens[:count]) for stop in stops)
        assert not any(stop in decode(tokenizer, tokens[: count - 1]) for stop in stops)
    assert cut.startswith(told)


def test_what_may_begin_a_stop_string_is_held_back():
    rule = StopRule(model(KINDS["bytes"]), Stop(strings=("stop", "opal")))
    assert rule.held_back("a st") == 2
    assert rule.held_back("a sto") == 3
    assert rule.held_back("a stopa") == 3
    assert rule.held_back("a b") == 0


def test_a_special_token_as_a_stop_string_is_that_token():
    tokenizer = KINDS["bytes"]
    rule = StopRule(model(tokenizer), Stop(strings=(END, "x")))
    assert rule.is_end_token(tokenizer.eos_token_id)
    assert rule.texts == ("x",)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_has_no_role_is_a_token_too(kind):
    """It never shows in a text, so that as a text it would stop nothing."""
    tokenizer = copy.deepcopy(KINDS[kind])
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    token = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert "<|turn|>" not in tokenizer.all_special_tokens
    assert "turn" not in decode(tokenizer, [token])
    rule = StopRule(model(tokenizer), Stop(strings=("<|turn|>", "x")))
    assert rule.is_end_token(token)
    assert rule.texts == ("x",)


def test_end_tokens_hold_beside_what_is_given_unless_that_is_empty():
    tokenizer = words(9)
    assert StopRule(model(tokenizer, frozenset({4})), None).is_end_token(4)
    assert not StopRule(model(tokenizer, frozenset({4})), Stop()).is_end_token(4)
    rule = StopRule(model(tokenizer, frozenset({4})), Stop(tokens=(5, 6)))
    assert [token for token in range(9) if rule.is_end_token(token)] == [4, 5, 6]
    assert StopRule(model(tokenizer, frozenset({4})), Stop(strings=("x",))).is_end_token(4)


def test_of_several_stop_strings_the_one_that_begins_first_ends_the_text():
    rule = StopRule(model(KINDS["bytes"]), Stop(strings=("cd", "bc", "d")))
    assert rule.find("abcd", 4) == 1
