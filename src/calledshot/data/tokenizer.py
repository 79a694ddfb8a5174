"""The tokenizer: a byte-level BPE of our own or any `tokenizer.json`, the lab's special tokens above its own ids."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from calledshot.recipe import RunError, UsageError
from calledshot.rundir import atomic_write

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SENTINELS = tuple(f"<|sentinel_{number}|>" for number in range(256))
MODES = ("<|R|>", "<|S|>", "<|X|>")
CHAT = ("<|system|>", "<|user|>", "<|assistant|>", "<|turn_end|>")
IMAGE = ("<|image_start|>", "<|image_end|>", "<|image|>")
SPECIALS = (BEGIN, END, PAD, *SENTINELS, *MODES, *CHAT, *IMAGE)
"""Reserved in every tokenizer, in this order, after the ordinary vocabulary."""

SMALLEST = 256 + len(SPECIALS)
"""Entries of a vocabulary of bytes alone."""

PATTERN = (
    r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where merges may not cross: GPT-4's pattern (tiktoken's cl100k_base), its contractions spelled out since two regex
engines fold case differently, and without possessive quantifiers, which one of them lacks."""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

LONG_RUN = re.compile(r"\s{20000}")
"""tiktoken's regex overflows its stack on such white space, so that these texts go through `tokenizers`."""

PART = 8 << 20
"""Characters encoded at once; a longer text is cut after a line break, since an encoding takes many times its text."""


def _byte_alphabet() -> dict[str, int]:
    """Character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_alphabet()

PROBES = (
    *("", " ", "\n", "\r\n\r\n  x", "\t\tif (a  !=b):\r\n\treturn  0  \n\n\n", " \n \n  \n   x\n    y\n\n     z   "),
    *("don't DON'T we'LL they'Ve 'ſ K's", "1234567890 3.14e-10 ٣٤٥ ⅷ ²", "x" * 700, "ǅungla ʰɛ ª º ⁿ ⓐ"),
    *("naïve cafe\u0301 A\u030a\u0327\u0301", "日本語のテキスト、한국어 텍스트", "हिन्दी ไทย עברית \u202eabc\u202c"),
    *("👩\u200d👩\u200d👧🏳️\u200d🌈 👍🏽", "".join(map(chr, range(256))), "\U0010ffff\ue000\ufffd\ufffe"),
    "a\u0000b\u0085c\u00a0d\u2028e\u2029f\u3000g\u200bh\ufeffi\x1c\x1d\x1ej",
    *("__init__(self, *args, **kwargs) -> None: # ----- ===== \\n", "".join(SPECIALS)),
    *(char * count for char in " \n-=#_a0.*\t\r/é" for count in (2, 3, 5, 9, 17, 31, 64)),
)
"""Strings on which encoders have been known to differ."""


class Tokenizer:
    """Text to ids and back. Ids of special tokens never come out of `encode`, whatever the text says."""

    def __init__(self, backend: tokenizers.Tokenizer, encoder: str = "auto") -> None:
        """`encoder` is `tiktoken`, `tokenizers`, or `auto`: tiktoken where both give the same ids for PROBES."""
        self._backend = backend
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        """Number of ids: the highest plus one."""
        self.special: dict[str, int] = {}
        """Ids of the lab's special tokens by name."""
        for name in SPECIALS:
            token = backend.token_to_id(name)
            assert token is not None, name
            self.special[name] = token
        self.begin, self.end, self.pad = self.special[BEGIN], self.special[END], self.special[PAD]
        self.sentinels = [self.special[name] for name in SENTINELS]
        self._spelling = _spelling(backend)
        self._fast = None if encoder == "tokenizers" else _tiktoken(backend)
        if encoder == "auto" and not self.agrees(PROBES):
            self._fast = None

    @property
    def reserved(self) -> frozenset[int]:
        """Ids of the lab's special tokens but the end: what no text holds."""
        return frozenset(self.special.values()) - {self.end}

    @property
    def encoder(self) -> str:
        """Which library encodes: `tiktoken` or `tokenizers`."""
        return "tokenizers" if self._fast is None else "tiktoken"

    @functools.cached_property
    def lossless(self) -> bool:
        """Whether texts come back as they were, as far as PROBES show. Where they do not (unknown words, lower case,
        normalisation), fewer bits are needed than the bytes hold, and bits per byte would flatter."""
        return all(self.decode_bytes(self.encode(text)) == well_formed(text).encode() for text in PROBES)

    @classmethod
    def load(cls, path: Path | str, encoder: str = "auto") -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a folder; special tokens that it lacks go above its own ids."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise UsageError(
                f"{file}: no such tokenizer; data.tokenizer takes `bpe`, a tokenizer.json or hf:OWNER/NAME"
            )
        try:
            text = file.read_text(encoding="utf-8")
        except ValueError as error:
            raise UsageError(f"{file}: not a tokenizer.json ({error})") from None
        return cls.from_json(text, str(file), encoder)

    @classmethod
    def from_json(cls, text: str, called: str = "tokenizer.json", encoder: str = "auto") -> Tokenizer:
        """What `load` makes of a file's text; `called` is the file in errors."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise UsageError(f"{called}: not a tokenizer.json ({error})") from None
        backend.add_special_tokens([_special(name) for name in SPECIALS if backend.token_to_id(name) is None])
        return cls(backend, encoder)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> Tokenizer:
        """Train a byte-level BPE of at most `vocabulary` entries, special tokens included. The same texts give the
        same bytes."""
        if vocabulary < SMALLEST:
            raise UsageError(
                f"model.vocabulary: {vocabulary} entries do not hold the bytes and special tokens; at least {SMALLEST}"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        isolated = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([isolated, to_bytes])
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - len(SPECIALS),
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens([_special(name) for name in SPECIALS])
        return cls(backend)

    def agrees(self, texts: Sequence[str]) -> bool:
        """Whether tiktoken gives the ids of `tokenizers` for each of these texts."""
        if self._fast is None:
            return False
        reference = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        return reference == [self._fast.encode_ordinary(text) for text in texts]

    def without_tiktoken(self) -> Tokenizer:
        """The same tokenizer, encoding through `tokenizers`."""
        return Tokenizer(self._backend, "tokenizers")

    def to_json(self) -> str:
        """The Hugging Face `tokenizer.json`."""
        return self._backend.to_str(pretty=True)

    def save(self, path: Path | str) -> None:
        """Write the Hugging Face `tokenizer.json`."""
        atomic_write(path, self.to_json())

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end. Lone surrogates become U+FFFD."""
        text = well_formed(text)
        return [token for part in _parts(text) for token in self._encode_part(part)]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several texts, on one core."""
        return [self.encode(text) for text in texts]

    def _encode_part(self, text: str) -> list[int]:
        if self._fast is not None and (len(text) < 20_000 or not LONG_RUN.search(text)):
            return self._fast.encode_ordinary(text)
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, special tokens spelled out; ids above the vocabulary give none."""
        if self._spelling is None:
            known = [int(token) for token in ids if token < self.size]
            return self._backend.decode(known, skip_special_tokens=False).encode()
        return b"".join(self._spelling[token] for token in ids if token < self.size)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def well_formed(text: str) -> str:
    """The text with lone surrogates, which JSON can carry and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _parts(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PART:
        stop = text.rfind("\n", start, start + PART) + 1 or start + PART
        yield text[start:stop]
        start = stop
    yield text[start:]


def _is_byte_level(description: dict) -> bool:
    """Whether the vocabulary spells bytes: GPT-2's decoder undoes it."""
    return (description.get("decoder") or {}).get("type") == "ByteLevel"


def _spelling(backend: tokenizers.Tokenizer) -> list[bytes] | None:
    """Bytes of every id, for byte-level vocabularies."""
    description = json.loads(backend.to_str())
    if not _is_byte_level(description):
        return None
    spelling = [b""] * (max(backend.get_vocab(with_added_tokens=True).values()) + 1)
    for token, index in backend.get_vocab(with_added_tokens=False).items():
        if all(char in _BYTES for char in token):
            spelling[index] = bytes(_BYTES[char] for char in token)
    for added in description["added_tokens"]:
        spelling[added["id"]] = added["content"].encode()
    return spelling


def _pattern(description: dict) -> str | None:
    """The regex of a byte-level pre-tokenizer, where it has no more than that."""
    pre = description.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    if len(steps) == 2 and steps[0].get("type") == "Split" and not last.get("use_regex", True):
        split = steps[0]
        if split.get("behavior") == "Isolated" and not split.get("invert"):
            return split.get("pattern", {}).get("Regex")
    return None


def _tiktoken(backend: tokenizers.Tokenizer) -> tiktoken.Encoding | None:
    """The same merges for tiktoken, or None where its algorithm is another: it joins by rank of the result, on bytes
    alone."""
    description = json.loads(backend.to_str())
    model = description["model"]
    pattern = _pattern(description)
    plain = not any(
        model.get(key) for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    )
    all_special = all(token["special"] for token in description["added_tokens"])
    if model.get("type") != "BPE" or description.get("normalizer") or not (pattern and plain and all_special):
        return None
    added = {token["content"] for token in description["added_tokens"]}
    vocabulary = {token: index for token, index in model["vocab"].items() if token not in added}
    results = [vocabulary.get("".join(pair if isinstance(pair, list) else pair.split(" "))) for pair in model["merges"]]
    if None in results or any(a >= b for a, b in pairwise(results)):
        return None
    if not all(char in _BYTES for token in vocabulary for char in token):
        return None
    ranks = {bytes(_BYTES[char] for char in token): index for token, index in vocabulary.items()}
    if len(ranks) < len(vocabulary) or not all(bytes([byte]) in ranks for byte in range(256)):
        return None
    try:
        return tiktoken.Encoding("lab", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except (ValueError, RuntimeError):  # a pattern that its regex engine does not know
        return None


def as_array(tokenizer: Tokenizer, text: str, dtype: np.dtype) -> np.ndarray:
    """A document as it is stored: `[begin] + tokens + [end]`."""
    tokens = tokenizer.encode(text)
    ids = np.empty(len(tokens) + 2, dtype)
    ids[0], ids[-1] = tokenizer.begin, tokenizer.end
    ids[1:-1] = tokens
    return ids


def check_size(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Raise where the model has no row for some id."""
    if vocabulary and tokenizer.size > vocabulary:
        raise UsageError(
            f"model.vocabulary: {vocabulary} is less than the tokenizer's {tokenizer.size} entries, special tokens "
            "included; raise it, or write 0 to follow the tokenizer"
        )


def reload(path: Path, encoder: str) -> Tokenizer:
    """A prepared tokenizer, which must be there as it was written."""
    if not path.is_file():
        raise RunError(f"{path}: missing; delete its folder and run `shot data build` again")
    return Tokenizer.load(path, encoder)
