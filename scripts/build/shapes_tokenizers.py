"""Tokenizers of the embedded pipelines: each word of a vocabulary is one token, and any text can be spelled."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5TokenizerFast


def make_clip_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """Make CLIP's byte-level BPE: every byte, alone and at the end of a word, and merges learned on the words."""
    learned = Tokenizer(BPE(end_of_word_suffix="</w>"))
    trainer = BpeTrainer(end_of_word_suffix="</w>", vocab_size=10_000, min_frequency=1, show_progress=False)
    # A word alone on its line, often: then each becomes one token.
    learned.pre_tokenizer = WhitespaceSplit()
    learned.train_from_iterator([*words, *words], trainer)
    merges = [tuple(m) for m in json.loads(learned.to_str())["model"]["merges"]]
    alphabet = ByteLevel.alphabet()
    pieces = sorted(alphabet) + [c + "</w>" for c in sorted(alphabet)] + ["".join(m) for m in merges]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def make_t5_tokenizer(words: Sequence[str]) -> T5TokenizerFast:
    """Make a Unigram vocabulary of the words and of single characters, so that any ASCII text can be spelled."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(chr(i), -10.0) for i in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=256)
