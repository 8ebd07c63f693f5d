"""A tokenizer like CLIP's, trained on a dataset's own words.

tokenizer = make_tokenizer(["two open hands", "a fist"], 1024)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .layout import BOS, EOS


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    pattern = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE like CLIP's, trained on `texts`. Its alphabet is all bytes, so it reads any script."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _normalizer(), _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            words[(*piece[:-1], piece[-1] + "</w>")] += 1
    symbols = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    merges = learn_merges(words, vocab_size - 2 - len(symbols))
    symbols += dict.fromkeys(first + second for first, second in merges)
    vocabulary = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>")
    tokenizer.add_special_tokens([BOS, EOS])
    return tokenizer


def learn_merges(words: Mapping[tuple[str, ...], int], most: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): at most `most` merges, the commonest pair first, ties by alphabet.

    So every process finds the same merges; the trainer of `tokenizers` does not guarantee that.
    words: a word as symbols -> its count.
    """
    words = dict(words)
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, count in words.items():
            merged[_merge(word, best)] += count
        words = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def special_tokens(tokenizer: Tokenizer, length: int) -> dict[str, int]:
    """Ids of a tokenizer from `make_tokenizer`; padding is the end-of-text token, as in CLIP."""
    vocabulary = tokenizer.get_vocab()
    return {"bos": vocabulary[BOS], "eos": vocabulary[EOS], "pad": vocabulary[EOS], "length": length}
