"""The tokenizer: text to token ids and back.

    tokenizer = Tokenizer(*train_bpe("corpus.txt", 10_000, ["<|endoftext|>"]), ["<|endoftext|>"])
    ids = tokenizer.encode("some text")
    assert tokenizer.decode(ids) == "some text"

Text is UTF-8 encoded, split at special tokens, cut into pre-tokens (pretokenize.py), and the merges are applied inside
each pre-token in the order of the merges list (encode_words.py).
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import numpy as np

from . import encode_file as _files
from . import formats
from .encode_words import Merges
from .pretokenize import GPT2_PATTERN, Specials, compile_pattern, is_vectorised, pretokenize, repair, utf8

AllowedSpecial = Literal["all", "none", "none_raise"] | set[str] | frozenset[str]
Offsets = list[tuple[int, int]]

# Words remembered with their ids; beyond it the memory starts afresh, so hostile text cannot grow it without bound.
CACHE_WORDS = 1 << 17
# Longer words are rare and not remembered.
CACHE_WORD_BYTES = 256


class Tokenizer:
    """A byte-level BPE tokenizer.

    vocab: token id to bytes; ids 0, 1, ... without holes below the largest, but for special tokens.
    merges: pairs of tokens; the earlier in the list, the earlier merged.
    special_tokens: strings that are one token each. One that the vocabulary lacks is appended to it.
    pattern: the regular expression (of the `regex` module) whose matches are the pre-tokens.

    Raises ValueError on holes, duplicates or missing bytes in `vocab`, merges of unknown tokens, empty or repeated
    special tokens, and a pattern that does not compile.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = GPT2_PATTERN,
    ) -> None:
        self.pattern = pattern
        self.vocab: dict[int, bytes] = dict(sorted(vocab.items()))
        self.merges: list[tuple[bytes, bytes]] = [(left, right) for left, right in merges]
        self._specials = Specials(special_tokens or ())
        if not is_vectorised(pattern):
            compile_pattern(pattern)
        id_of = _check_vocab(self.vocab)
        for token in self._specials.encoded:
            if token not in id_of:
                id_of[token] = max(self.vocab, default=-1) + 1
                self.vocab[id_of[token]] = token
        self.special_tokens: dict[str, int] = {
            text: id_of[token] for text, token in zip(self._specials.tokens, self._specials.encoded, strict=True)
        }
        _check_holes(self.vocab, set(self.special_tokens.values()))
        self.vocab_size = max(self.vocab) + 1
        self._merges = Merges([id_of[bytes([b])] for b in range(256)], _check_merges(self.merges, id_of))
        self._cache: dict[bytes, list[int]] = {}

    def __repr__(self) -> str:
        specials = list(self.special_tokens)
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={specials}, hash={self.hash[:12]})"

    def __reduce__(self) -> tuple:
        # Workers get the four things that define a tokenizer, not its caches.
        return _rebuild, (self.vocab, self.merges, list(self.special_tokens), self.pattern)

    @property
    def hash(self) -> str:
        """sha256 (hex) of all that decides which ids a text gets. Token files carry it."""
        content = [
            self.pattern,
            [[i, token.hex()] for i, token in self.vocab.items()],
            [[left.hex(), right.hex()] for left, right in self.merges],
            sorted(self.special_tokens.items()),
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    # ------------------------------------------------------------------------------------------------ encoding

    @overload
    def encode(self, text: str, *, allowed_special: AllowedSpecial = "all") -> list[int]: ...
    @overload
    def encode(
        self, text: str, *, allowed_special: AllowedSpecial = "all", offsets: Literal[True]
    ) -> tuple[list[int], Offsets]: ...
    def encode(self, text, *, allowed_special="all", offsets=False):
        """Token ids of `text`.

        allowed_special: which special tokens become their id where they stand in the text: "all"; "none", where they
        are ordinary text; "none_raise", where they are a ValueError; or a set of them, the others being ordinary text.
        Text from users is to be encoded with "none" or "none_raise".
        offsets: also return, for each id, the (start, end) of its characters in `text`. Tokens that split one character
        between them all have that character's.
        """
        data = utf8(text)
        ids = self._encode_bytes(data, self._allowed(allowed_special, data))
        return (ids, self._offsets(text, ids)) if offsets else ids

    def encode_iterable(self, iterable: Iterable[str], *, allowed_special: AllowedSpecial = "all") -> Iterator[int]:
        """The ids of "".join(iterable), one by one, in bounded memory: pieces may end anywhere, inside a word too.

        With a custom pattern a document (the text between two special tokens) is held in memory.
        """
        specials = self._allowed(allowed_special)
        for data in _files.cut_stream(map(utf8, iterable), specials, self.pattern):
            if allowed_special == "none_raise":
                self._allowed(allowed_special, data)
            yield from self._encode_bytes(data, specials)

    def encode_batch(
        self, texts: Iterable[str], *, num_workers: int | None = None, allowed_special: AllowedSpecial = "all"
    ) -> list[list[int]]:
        """encode() of each text, on `num_workers` processes (None: as many as pay)."""
        return [self.encode(text, allowed_special=allowed_special) for text in texts]

    def encode_file(self, path: str | Path, out_path: str | Path, *, num_workers: int | None = None) -> int:
        """Encode a text file into the token file `out_path` and its JSON header; returns the number of tokens.

        Little-endian uint16, or uint32 when vocab_size > 65536. Special tokens become their ids. Invalid UTF-8 is read
        as U+FFFD, as in training. Both files appear whole or not at all.
        """
        return _files.encode_file(self, Path(path), Path(out_path), num_workers=num_workers)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids (int32) of UTF-8 text, special tokens included; invalid sequences are read as U+FFFD."""
        return np.array(self._encode_bytes(repair(data), self._specials), np.int32)

    def _allowed(self, allowed: AllowedSpecial, data: bytes = b"") -> Specials:
        if allowed == "all":
            return self._specials
        if allowed in ("none", "none_raise"):
            if allowed == "none_raise" and (found := self._specials.findall(data)):
                raise ValueError(
                    f"text: has the special token {found[0].decode()!r}, which allowed_special='none_raise' refuses"
                )
            return Specials(())
        if isinstance(allowed, str):
            raise ValueError(f"allowed_special: got {allowed!r}, expected 'all', 'none', 'none_raise' or a set")
        if unknown := set(allowed) - set(self.special_tokens):
            raise ValueError(f"allowed_special: {unknown} are not special tokens of this tokenizer")
        return Specials([token for token in self._specials.tokens if token in allowed])

    def _encode_bytes(self, data: bytes, specials: Specials) -> list[int]:
        ids: list[int] = []
        found = iter(specials.findall(data))
        cache = self._cache
        for word in pretokenize(specials.mask(data), self.pattern).tolist():
            if word == b"\xff":
                ids.append(self.special_tokens[next(found).decode()])
                continue
            known = cache.get(word)
            if known is None:
                known = self._merges.encode_word(word)
                if len(word) <= CACHE_WORD_BYTES:
                    if len(cache) >= CACHE_WORDS:
                        cache.clear()
                    cache[word] = known
            ids += known
        return ids

    def _offsets(self, text: str, ids: list[int]) -> Offsets:
        lengths = np.array([len(self.vocab[i]) for i in ids], np.int64)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if not text.isascii():
            # The character that each byte belongs to: as many characters have started as bytes that continue none.
            lead = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
            character = np.cumsum(lead) - 1
            starts, ends = character[starts], character[ends - 1] + 1
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    # ------------------------------------------------------------------------------------------------ decoding

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises ValueError on an id that is not in the vocabulary."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        try:
            return b"".join(map(self.vocab.__getitem__, ids))
        except KeyError:
            bad = next(i for i in ids if i not in self.vocab)
            raise ValueError(f"ids: {bad!r} is not in the vocabulary, expected 0 <= id < {self.vocab_size}") from None

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text that `ids` stand for; bytes that are no UTF-8 become U+FFFD unless `errors` says otherwise."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decoder(self) -> IncrementalDecoder:
        """A decoder for ids that come one at a time."""
        return IncrementalDecoder(self)

    # ------------------------------------------------------------------------------------------------ files

    def save(self, directory: str | Path) -> None:
        """Write vocab.json, merges.txt (both as GPT-2 writes them) and tokenizer_config.json into `directory`."""
        formats.save(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer that save() wrote. Raises ValueError when the files no longer hold what was saved."""
        vocab, merges, specials, pattern, saved_hash = formats.read_directory(Path(directory))
        tokenizer = cls(vocab, merges, specials, pattern=pattern)
        if tokenizer.hash != saved_hash:
            raise ValueError(f"directory: the files of {directory} were changed after saving: their hash differs")
        return tokenizer

    @classmethod
    def from_files(
        cls,
        vocab_path: str | Path,
        merges_path: str | Path,
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: str = GPT2_PATTERN,
    ) -> Tokenizer:
        """From GPT-2's vocab.json (encoder.json) and merges.txt (vocab.bpe), or files of that form."""
        vocab, merges = formats.read_gpt2(Path(vocab_path), Path(merges_path), special_tokens or ())
        return cls(vocab, merges, special_tokens, pattern=pattern)


class IncrementalDecoder:
    """Decodes a stream of ids, holding back bytes until they complete a character.

    "".join(decoder.push(i) for i in ids) + decoder.finish() == tokenizer.decode(ids)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: int | Iterable[int]) -> str:
        """The characters that `ids` complete; may be empty. Raises ValueError on an id out of the vocabulary."""
        one = isinstance(ids, (int, np.integer))
        return self._utf8.decode(self._tokenizer.decode_bytes([ids] if one else ids))

    def finish(self) -> str:
        """What is left of a character that was never completed, as U+FFFD. The decoder is then as new."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _rebuild(vocab, merges, special_tokens, pattern):
    return Tokenizer(vocab, merges, special_tokens, pattern=pattern)


def _check_vocab(vocab: Mapping[int, bytes]) -> dict[bytes, int]:
    id_of: dict[bytes, int] = {}
    for i, token in vocab.items():
        if not isinstance(i, int) or i < 0 or not isinstance(token, bytes) or not token:
            raise ValueError(f"vocab: {i!r}: {token!r}, expected an id >= 0 and non-empty bytes")
        if id_of.setdefault(token, i) != i:
            raise ValueError(f"vocab: ids {id_of[token]} and {i} are both {token!r}")
    for byte in range(256):
        if bytes([byte]) not in id_of:
            raise ValueError(f"vocab: the single byte {bytes([byte])!r} is missing, expected all 256")
    return id_of


def _check_holes(vocab: Mapping[int, bytes], special_ids: set[int]) -> None:
    # tiktoken's own encodings leave gaps among the special tokens at the top; those are harmless.
    for expected in range(max(vocab.keys() - special_ids)):
        if expected not in vocab:
            raise ValueError(f"vocab: id {expected} is missing, expected no holes below the largest id")


def _check_merges(merges: Sequence[tuple[bytes, bytes]], id_of: Mapping[bytes, int]) -> list[tuple[int, int, int]]:
    pairs = []
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in id_of:
                raise ValueError(f"merges: {token!r} of merge {rank}, {(left, right)!r}, is not in the vocabulary")
        pairs.append((id_of[left], id_of[right], id_of[left + right]))
    if len({(left, right) for left, right, _ in pairs}) < len(pairs):
        raise ValueError("merges: a pair is listed more than once")
    return pairs
