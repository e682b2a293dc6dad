"""JSONL, chat templates, docstrings, loader."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tensafe_client import BatchError, ConfigError, DataLoader, NoChatTemplateError
from tensafe_client.data import Example, docstring_pairs, read_jsonl, split_by_module
from tensafe_client.data.chat import ChatTokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_what_is_no_json_is_told_with_one_line_number(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "t"}\n{"text": "t",\n{"text": "t"}\n')
    with pytest.raises(BatchError) as caught:
        read_jsonl(path)
    found = re.findall(r"line \d+", str(caught.value).replace(str(path), ""))
    assert found == ["line 2"]
    assert "at character" in str(caught.value)


def test_jsonl_forms(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    path = lines(
        tmp_path / "d.jsonl",
        {"messages": [user, assistant], "source": "extra columns are kept out"},
        "",
        {"prompt": "p", "completion": "c"},
        {"prompt": [user], "completion": [assistant]},
        {"text": "t", "system": None, "tools": []},
    )
    assert read_jsonl(path) == [
        Example(messages=(user, assistant)),
        Example(prompt="p", completion="c"),
        Example(messages=(user, assistant), prompt_messages=1),
        Example(text="t"),
    ]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ("{", "JSON"),
        ([1], "object"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "asistant", "content": "q"}]}, "'assistant', only of ['asistant']"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"prompt": "p"}, "completion"),
        ({"prompt": "p", "completion": ""}, "completion"),
        ({"prompt": "p", "completion": [1]}, "both"),
        ({"text": "t", "prompt": "p", "completion": "c"}, "text"),
        ({"question": "q"}, "question"),
        ({"prompt": "a", "completion": "\ud800"}, "`completion` has half of a surrogate pair"),
        (
            {"prompt": "ab\udfff", "completion": "c"},
            r"`prompt` has half of a surrogate pair, \udfff",
        ),
        ({"text": "\ud800"}, "surrogate"),
        ({"text": "t", "unit_id": 7}, "`unit_id`"),
        ({"text": "t", "unit_id": ""}, "`unit_id`"),
        ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "messages[0].content"),
        (r'{"text": "\ud83d\ude00 \ud83d"}', "at character 2"),
        *(
            ({"prompt": "p", "completion": "c", name: value}, f"`{name}` would not be read")
            for name, value in (("tools", [{}]), ("system", "be brief"), ("input", "2 + 2"))
        ),
        ({"messages": [{"role": "assistant", "content": "a"}], "system": "s"}, "`system` would"),
        ({"instruction": "i", "output": "o"}, "it has instruction, output"),
        ('{"prompt": "a", "completion": "b", "prompt": "c"}', "the key 'prompt' twice"),
        (
            '{"messages": [{"role": "assistant", "content": "a", "content": "b"}]}',
            "the key 'content' twice",
        ),
        pytest.param("[" * 100_000, "nested too deeply", id="nested"),
    ],
)
def test_a_bad_line_is_named_by_number(tmp_path: Path, record: Any, why: str) -> None:
    path = lines(tmp_path / "d.jsonl", {"text": "fine"}, record)
    with pytest.raises(BatchError) as caught:
        read_jsonl(path)
    assert "line 2" in str(caught.value)
    assert why in str(caught.value)


def test_an_example_keeps_the_number_of_its_line(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", "", {"text": "a"}, " ", {"prompt": "p", "completion": "c"})
    first, second = read_jsonl(path)
    assert (first.line, second.line) == (2, 4)
    assert first == Example(text="a")


def test_an_example_says_whose_it_is(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", {"text": "a", "unit_id": "ann"}, {"text": "b"})
    assert [example.unit_id for example in read_jsonl(path)] == ["ann", None]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="no examples"):
        read_jsonl(lines(tmp_path / "d.jsonl", ""))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
    )
    made.train_from_iterator(["user assistant hello"], trainer)
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": CHATML}
    return {
        "tokenizer.json": made.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def learned(tokenizer: ChatTokenizer, example: Example, **options: Any) -> str:
    datum = tokenizer.datum(example, **options)
    kept = [t for t, w in zip(datum.target_tokens, datum.weights, strict=True) if w]
    return tokenizer.decode(kept, skip_special_tokens=False)


def conversation(*contents: str) -> tuple[dict[str, str], ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents))


def test_only_the_assistant_is_learned(files: dict[str, bytes]) -> None:
    tokenizer = ChatTokenizer(files)
    messages = conversation("ask ☃", "answer é", "more", "end")
    assert learned(tokenizer, Example(messages=messages)) == "answer é<|im_end|>end<|im_end|>"
    late = Example(messages=messages, prompt_messages=3)
    assert learned(tokenizer, late) == "end<|im_end|>"
    datum = tokenizer.datum(Example(messages=messages))
    assert datum.tokens[1:].tolist() == datum.target_tokens[:-1].tolist()
    whole = tokenizer.decode([*datum.tokens, datum.target_tokens[-1]], skip_special_tokens=False)
    assert whole == tokenizer.render(messages)


def test_all_that_a_template_puts_after_a_turn_is_learned_if_no_special_token_ends_it(
    files: dict[str, bytes],
) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = ChatTokenizer({**files, "chat_template.jinja": source.encode()})
    assert learned(tokenizer, Example(messages=conversation("q", "a", "q"))) == "a\n\n"


def test_a_special_token_inside_a_turn_does_not_end_it(files: dict[str, bytes]) -> None:
    tokenizer = ChatTokenizer(files)
    messages = conversation("q", "a<|im_start|>b ")
    assert learned(tokenizer, Example(messages=messages)) == "a<|im_start|>b <|im_end|>"


def test_text_that_is_none_is_refused(files: dict[str, bytes]) -> None:
    tokenizer = ChatTokenizer(files)
    for example in (Example(text="a\ud800"), Example(messages=conversation("\ud800", "a"))):
        with pytest.raises(BatchError, match="surrogate"):
            tokenizer.datum(example)


def test_completion_and_text(files: dict[str, bytes]) -> None:
    tokenizer = ChatTokenizer(files)
    assert learned(tokenizer, Example(prompt="ab", completion=" cd")) == " cd<|im_end|>"
    assert learned(tokenizer, Example(text="abc")) == "bc<|im_end|>"


def test_cutting(files: dict[str, bytes]) -> None:
    tokenizer = ChatTokenizer(files)
    assert len(tokenizer.datum(Example(text="x" * 99), max_tokens=10)) == 10
    with pytest.raises(BatchError, match="max_tokens"):
        tokenizer.datum(Example(prompt="a long prompt", completion="c"), max_tokens=2)


def test_templates_run_in_a_sandbox_and_may_refuse(files: dict[str, bytes]) -> None:
    def with_template(source: str) -> ChatTokenizer:
        return ChatTokenizer({**files, "chat_template.jinja": source.encode()})

    with pytest.raises(BatchError, match="no system"):
        with_template("{{ raise_exception('no system') }}").render(conversation("q"))
    with pytest.raises(BatchError):
        with_template("{{ ''.__class__.__mro__ }}").render(conversation("q"))
    assert with_template("{{ eos_token }}").render(conversation("q")) == "<|im_end|>"
    with pytest.raises(NoChatTemplateError):
        ChatTokenizer({"tokenizer.json": files["tokenizer.json"]}).render(conversation("q"))
    with pytest.raises(ConfigError):
        ChatTokenizer({})


def test_a_template_that_cannot_be_masked_is_refused(files: dict[str, bytes]) -> None:
    source = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = ChatTokenizer({**files, "chat_template.jinja": source.encode()})
    with pytest.raises(BatchError, match="mask"):
        tokenizer.datum(Example(messages=conversation("q", "a", "q", "a")))


def test_docstrings_are_many_steady_and_held_out_by_module() -> None:
    pairs = docstring_pairs()
    assert len(pairs) > 1500
    assert len({pair.module for pair in pairs}) >= 90
    assert pairs == docstring_pairs()
    assert not any("0x" in pair.signature for pair in pairs)
    train, test = split_by_module(pairs)
    assert not {p.module for p in train} & {p.module for p in test}
    assert 0.05 < len(test) / len(pairs) < 0.3
    assert len(train) + len(test) == len(pairs)
    example = test[0].example()
    assert example.messages is not None
    assert example.messages[1]["content"] == test[0].summary


def test_loader_covers_each_epoch_and_resumes() -> None:
    loader = DataLoader(range(10), batch_size=4, epochs=2, seed=3)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(item for batch in epoch for item in batch) == list(range(10))
    assert batches[:3] != batches[3:]
    assert list(DataLoader(range(10), batch_size=4, epochs=2, seed=3, start=4)) == batches[4:]
    assert list(DataLoader(range(5), batch_size=2, seed=None, drop_last=True)) == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError):
        DataLoader([], batch_size=2)
    with pytest.raises(TypeError):
        len(DataLoader([1], epochs=None))
