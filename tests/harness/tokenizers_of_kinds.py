"""Small tokenizers of the kinds that models have, made without any training text."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"


def byte_level() -> PreTrainedTokenizerFast:
    """One token for each byte and a few longer ones, as GPT-2, Llama 3, Qwen and SmolLM2 have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = [("s", "t"), ("st", "o"), ("sto", "p"), ("Ġ", "a"), ("\u010a", "\u010a")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Pieces with ▁ for spaces, and bytes for what has no piece, as Llama 2 and Gemma have."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁st", "op", "▁stop", *"abcdefghijklmnopqrstuvwxyz.!\n"]
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def words(count: int) -> PreTrainedTokenizerFast:
    """A word for each token: w00, w01, …; decoded with spaces between them."""
    vocabulary = {f"w{number:02d}": number for number in range(count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
