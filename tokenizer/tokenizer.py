"""The tokenizer: text to token ids and back.

    tokenizer = Tokenizer(*train_bpe("corpus.txt", 10_000, ["<|endoftext|>"]), ["<|endoftext|>"])
    ids = tokenizer.encode("some text")
    assert tokenizer.decode(ids) == "some text"

Text is UTF-8 encoded, split at special tokens, cut into pre-tokens (pretokenize/), and the merges are applied inside
each pre-token in the order of the merges list (encoding/words.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, overload

import numpy as np

from . import encode_file as _files
from .decode import IncrementalDecoder
from .definition import Definition, define
from .encoding import Core, Encoder, WordEncoder, compiled_core, cutter_of, is_by_rank
from .formats import directory as own_format
from .formats import hugging_face, tiktoken
from .pretokenize import GPT2_PATTERN, Cutter, Pattern, cut_stream, utf8
from .sizes import STREAM_PIECE, TASK

AllowedSpecial = Literal["all", "none", "none_raise"] | set[str] | frozenset[str]
Offsets = list[tuple[int, int]]
# Sets of allowed special tokens that a tokenizer remembers.
_MAX_SETS = 64


class Tokenizer:
    """A byte-level BPE tokenizer.

    vocab: token id to bytes; ids 0, 1, ... without holes below the largest, but for special tokens.
    merges: pairs of tokens; the earlier in the list, the earlier merged.
    special_tokens: strings that are one token each, or these with their ids. One that the vocabulary lacks is appended
        to it. Its bytes may be an ordinary token's too; of the two ids it then has the smaller, unless ids are given.
    pattern: "gpt2", "cl100k", "o200k", "llama3", "qwen2", "deepseek"; or a regular expression (of the `regex` module)
        whose matches are the pre-tokens; or several, each of which splits what those before it left, and there what
        none matches is a pre-token too.
    ignore_merges: a pre-token that is a token is that token, whatever its merges give. (Llama 3 and tiktoken do so; of
        a trained vocabulary it changes nothing.)

    Raises ValueError on holes, duplicates or missing bytes in `vocab`, merges of unknown tokens, empty or repeated
    special tokens, and a pattern that does not compile.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | Mapping[str, int] | None = None,
        *,
        pattern: Pattern = GPT2_PATTERN,
        ignore_merges: bool = False,
    ) -> None:
        self._set_up(define(vocab, merges, special_tokens or (), pattern, ignore_merges))
        self.warm_up()

    def _set_up(self, definition: Definition, by_rank: bool | None = None) -> None:
        self.definition = definition
        if by_rank is not None:
            self.__dict__["is_by_rank"] = by_rank
        self.vocab = self.definition.vocab
        self.vocab_size = self.definition.vocab_size
        self.special_tokens = self.definition.special_tokens
        self.pattern = self.definition.pattern
        self.ignore_merges = definition.ignore_merges
        self._tokens = definition.tokens
        self._words = WordEncoder(self.definition, self._tokens)
        self._encoder = Encoder(self._words, self.pattern, self._tokens, definition.options)
        self._is_warm = False
        # By the special tokens that stand for themselves: all, none, or some.
        self._all, self._none = cutter_of(definition, self.special_tokens), cutter_of(definition, ())
        self._some: dict[frozenset[str], Cutter] = {}

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, special_tokens={list(self.special_tokens)})"

    def __reduce__(self) -> tuple:
        # Workers get what defines a tokenizer, not its tables.
        return _set_up, (self.definition, self.__dict__.get("is_by_rank"))

    def warm_up(self) -> None:
        """Makes what the first short text would else wait for, once: with `tiktoken`, its compiled core.

        That is done already, but for a tokenizer that was pickled: most processes that get one encode long texts.
        """
        if not self._is_warm:
            self._warm_up(compiled_core(self.definition) if self.is_by_rank else None)

    def _warm_up(self, core: Core | None) -> None:
        self._encoder.warm_up(core)
        self.definition.forget()
        self._is_warm = True

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """Pairs of tokens, the first one merged first."""
        return self.definition.merges

    @cached_property
    def is_by_rank(self) -> bool:
        """Whether the merges list means what tiktoken's ranks mean; export_tiktoken is for such."""
        return is_by_rank(self.definition)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of all that decides which ids a text gets. Token files carry it."""
        return self.definition.hash

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
        if not isinstance(text, str):
            raise ValueError(f"text: got {type(text).__name__}, expected str")
        allowed = self._all
        if allowed_special != "all":
            allowed = self._allowed(allowed_special)
            if allowed_special == "none_raise":
                self._refuse_specials(text)
        if offsets:
            return self._encoder.encode_with_offsets(text, allowed.specials)
        if len(text) < self._encoder.short:
            return self._encoder.encode_short(text, allowed.specials)
        if not self._is_warm:
            self.warm_up()
            return self.encode(text, allowed_special=allowed_special)
        return self._encoder.encode_to_list(cut_stream([utf8(text)], allowed, TASK), allowed.specials)

    def encode_iterable(self, iterable: Iterable[str], *, allowed_special: AllowedSpecial = "all") -> Iterator[int]:
        """The ids of "".join(iterable), one by one, in bounded memory: pieces may end anywhere, inside a word too.

        With a custom pattern a document (the text between two special tokens) is held in memory.
        """
        allowed = self._allowed(allowed_special)
        # Pieces that end inside no special token, allowed or not, so that "none_raise" sees each whole. With a custom
        # pattern they end at special tokens, so these must be allowed.
        cutter = self._all if self._all.inside_documents else allowed
        for data in cut_stream(map(utf8, iterable), cutter, STREAM_PIECE):
            if allowed_special == "none_raise":
                self._refuse_specials(data.decode())
            yield from self._encoder.encode_to_list([data], allowed.specials)

    def encode_batch(
        self, texts: Iterable[str], *, num_workers: int | None = None, allowed_special: AllowedSpecial = "all"
    ) -> list[list[int]]:
        """encode() of each text, in `num_workers` processes (None: one for each core, where the texts are worth it)."""
        if isinstance(texts, str | bytes):
            raise ValueError(f"texts: got {type(texts).__name__}, expected an iterable of str")
        if allowed_special == "none_raise":
            texts = list(texts)
            for text in texts:
                self._refuse_specials(text)
        encode_many = partial(self._encoder.bulk.encode_many, allowed=self._allowed(allowed_special).specials)
        return _files.encode_batch(encode_many, texts, num_workers=num_workers)

    def encode_many(
        self, texts: Sequence[str], *, allowed_special: AllowedSpecial = "all"
    ) -> tuple[np.ndarray, list[int]]:
        """The ids (int32) of all texts, one text after another, and how many each text has. In this process."""
        if isinstance(texts, str | bytes):
            raise ValueError(f"texts: got {type(texts).__name__}, expected a sequence of str")
        if allowed_special == "none_raise":
            for text in texts:
                self._refuse_specials(text)
        return self._encoder.bulk.encode_many(list(texts), self._allowed(allowed_special).specials)

    def encode_file(
        self, path: str | Path, out_path: str | Path, *, num_workers: int | None = None, progress: bool = False
    ) -> int:
        """Encode a text file into the token file `out_path` and its JSON header; returns the number of tokens.

        Little-endian uint16, or uint32 when vocab_size > 65536. Special tokens become their ids. Invalid UTF-8 is read
        as U+FFFD, as in training. Both files appear whole or not at all, and are the same for any num_workers (None:
        one process for each core). progress: a bar on standard error.
        """
        return _files.encode_file(
            self._encoder.bulk,
            self._all,
            self.vocab_size,
            self.hash,
            Path(path),
            Path(out_path),
            num_workers=num_workers,
            progress=progress,
        )

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids (int32) of UTF-8 text, special tokens included; invalid sequences are read as U+FFFD."""
        return self._encoder.bulk.encode_bytes(data, self._all)

    def _allowed(self, allowed: AllowedSpecial) -> Cutter:
        if isinstance(allowed, str):
            if allowed not in ("all", "none", "none_raise"):
                raise ValueError(f"allowed_special: got {allowed!r}, expected 'all', 'none', 'none_raise' or a set")
            return self._all if allowed == "all" else self._none
        key = frozenset(allowed)
        if (cutter := self._some.get(key)) is None:
            if unknown := key - set(self.special_tokens):
                raise ValueError(f"allowed_special: {unknown} are not special tokens of this tokenizer")
            if len(self._some) > _MAX_SETS:
                self._some.clear()
            cutter = self._some[key] = cutter_of(self.definition, key)
        return cutter

    def _refuse_specials(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"text: got {type(text).__name__}, expected str")
        if len(parts := self._all.specials.split(text)) > 1:
            raise ValueError(f"text: has the special token {parts[1]!r}, which allowed_special='none_raise' refuses")

    # ------------------------------------------------------------------------------------------------ decoding

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for. Raises ValueError on an id that is not in the vocabulary."""
        return self._tokens.join(ids)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text that `ids` stand for; bytes that are no UTF-8 become U+FFFD unless `errors` says otherwise."""
        return self._tokens.join(ids).decode("utf-8", errors)

    def decoder(self) -> IncrementalDecoder:
        """A decoder for ids that come one at a time."""
        return IncrementalDecoder(self)

    # ------------------------------------------------------------------------------------------------ files

    def save(self, directory: str | Path) -> None:
        """Write vocab.json, merges.txt (both as GPT-2 writes them) and tokenizer_config.json into `directory`.

        And tokenizer.json, where that gives the same ids: then transformers' AutoTokenizer opens the folder as well.
        A tokenizer that the folder holds is replaced when all files are on the disk, or kept where one cannot be
        written. Raises ValueError on a folder with a tokenizer of another kind.
        """
        own_format.save(self.definition, Path(directory), self.is_by_rank, self.encode)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer that save() wrote, or that of a Hugging Face folder or tokenizer.json.

        Raises FileNotFoundError when there is none, ValueError when the files no longer hold what was saved.
        """
        path = Path(directory)
        if path.suffix == ".json":
            return cls.from_hf(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no folder of a tokenizer there, and no tokenizer.json")
        if (path / own_format.HUGGING_FACE).exists() and not own_format.is_ours(path):
            return cls.from_hf(path / own_format.HUGGING_FACE)
        definition, saved_hash, by_rank = own_format.read_directory(path)
        tokenizer = _build(definition, by_rank)
        tokenizer.__dict__["hash"] = saved_hash
        return tokenizer

    @classmethod
    def from_files(
        cls,
        vocab_path: str | Path,
        merges_path: str | Path,
        special_tokens: Sequence[str] | None = None,
        *,
        pattern: Pattern = GPT2_PATTERN,
    ) -> Tokenizer:
        """From GPT-2's vocab.json (encoder.json) and merges.txt (vocab.bpe), or files of that form."""
        vocab, merges = own_format.read_gpt2(Path(vocab_path), Path(merges_path), dict.fromkeys(special_tokens or ()))
        return _build(define(vocab, merges, special_tokens or (), pattern, False))

    def export_hf(self, path: str | Path) -> None:
        """Write a tokenizer.json for Hugging Face tokenizers and transformers, which then gives the same ids.

        Of a custom pattern that is so where the two regular-expression engines agree: where `tokenizers` is installed
        the file is tried on texts of many kinds. Raises ValueError when an id differs.
        """
        hugging_face.export_hf(self.definition, Path(path), self.encode)

    @classmethod
    def from_hf(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json with a byte-level BPE model; added tokens become special tokens.

        Pre-tokenizers may be Splits by expressions, Digits and ByteLevel, the normalizer NFC (decoding then gives the
        normal form), added tokens may take white space beside them. Their ids are those that `tokenizers` gives them,
        with a warning where the file says otherwise. Post-processors, which add tokens at the ends, are left out.
        Raises ValueError on a model, normalizer, pre-tokenizer or added token of another kind.
        A vocabulary may lack single bytes (SmolLM2's has no token for the control character 4): to encode a text that
        has one is then a ValueError, where `tokenizers` drops the byte.
        """
        return _build(hugging_face.read_hf(Path(path)))

    def export_tiktoken(self, path: str | Path) -> None:
        """Write the ranks of the ordinary tokens as tiktoken.load.load_tiktoken_bpe reads them.

        tiktoken has no merges list: it merges whatever two neighbours make a token, the smallest id first. Raises
        ValueError when the merges list does not say the same; a list in the order of the ids, as trained, does.
        """
        tiktoken.export_tiktoken(self.definition, Path(path))

    @classmethod
    def from_tiktoken(
        cls,
        path: str | Path,
        pattern: Pattern = GPT2_PATTERN,
        special_tokens: Sequence[str] | Mapping[str, int] = (),
    ) -> Tokenizer:
        """From tiktoken's ranks; special tokens get the ids after the largest rank unless a mapping gives them."""
        return _build(*tiktoken.read_tiktoken(Path(path), special_tokens, pattern))


def _build(definition: Definition, by_rank: bool | None = None) -> Tokenizer:
    """Of a definition that is checked."""
    by_rank = is_by_rank(definition) if by_rank is None else by_rank
    # Before the tables, so that what it is made from is gone when they come.
    core = compiled_core(definition) if by_rank else None
    tokenizer = _set_up(definition, by_rank)
    tokenizer._warm_up(core)
    return tokenizer


def _set_up(definition: Definition, by_rank: bool | None) -> Tokenizer:
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer._set_up(definition, by_rank)
    return tokenizer
