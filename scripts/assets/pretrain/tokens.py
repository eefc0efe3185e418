"""A small byte-pair vocabulary in CLIP's format, learned from the captions, for both libraries."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from open_clip.tokenizer import bytes_to_unicode
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

CONTEXT_LENGTH = 12
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_merges(captions: Iterable[str], number: int = 512) -> list[tuple[str, str]]:
    """The most frequent byte-pair merges of the captions' words, most frequent first."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + number, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(sorted(set(captions)), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges][:number]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's numbering: bytes, bytes at a word's end, merges, start and end marks."""
    characters = list(bytes_to_unicode().values())
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(merges: list[tuple[str, str]]) -> CLIPTokenizer:
    """The vocabulary as a transformers tokenizer of `CONTEXT_LENGTH` tokens."""
    return CLIPTokenizer(vocab=vocabulary(merges), merges=merges, model_max_length=CONTEXT_LENGTH)


def write_open_clip_vocabulary(merges: list[tuple[str, str]], file: Path) -> None:
    """The vocabulary as open_clip's SimpleTokenizer reads it: a title line, then one merge a line."""
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    file.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
