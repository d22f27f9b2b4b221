"""One tokenizer, ours or a peer, timed in a process of its own.

    python -m rooflight.bench.cases.tokenizer_peers JOB

JOB is the JSON of a dict: peer, task ("train", "encode" or "encode file"), text (a path), vocab_size, workers,
tokenizer (a folder that `compare` wrote), out (where to write the JSON of what was measured). A process for each
measurement starts with empty caches, has a peak of memory of its own, and cannot be slowed by what another library
left behind.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...tokenizer import GPT2_PATTERN, Tokenizer, train_bpe
from ...tokenizer.files import read_token_file

END_OF_TEXT = "<|endoftext|>"
SHORT, N_SHORT = 200, 2_000  # characters, and texts of so many: what people send to a model


def trainers() -> dict[str, Callable[[Path, int, int], int]]:
    """By peer: train(path, vocab_size, workers) -> number of tokens in its vocabulary."""
    return {
        "rooflight": _train_rooflight,
        "tokenizers": _train_tokenizers,
        "gigabpe": _train_gigabpe,
        "gigatoken": _train_gigatoken,
        "rustbpe": _train_rustbpe,
        "bpeasy": _train_bpeasy,
        "sentencepiece": _train_sentencepiece,
    }


def _train_rooflight(path: Path, vocab_size: int, workers: int) -> int:
    return len(train_bpe(path, vocab_size, [END_OF_TEXT], num_workers=workers)[0])


def _train_tokenizers(path: Path, vocab_size: int, workers: int) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(path)], trainer)
    return tokenizer.get_vocab_size()


def _train_gigabpe(path: Path, vocab_size: int, workers: int) -> int:
    import gigabpe

    return len(
        gigabpe.train_bpe(
            [str(path)],
            vocab_size=vocab_size,
            pretokenizer="bytelevel",
            special_tokens=[END_OF_TEXT],
            threads=workers,
        )[0]
    )


def _train_gigatoken(path: Path, vocab_size: int, workers: int) -> int:
    import gigatoken

    return len(gigatoken.train_bpe(str(path), vocab_size, [END_OF_TEXT])[0])


def _train_rustbpe(path: Path, vocab_size: int, workers: int) -> int:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(_documents(path), vocab_size - 1, pattern=GPT2_PATTERN)
    return tokenizer.vocab_size + 1


def _train_bpeasy(path: Path, vocab_size: int, workers: int) -> int:
    import bpeasy

    return 1 + len(bpeasy.train_bpe(_documents(path), GPT2_PATTERN, 128, vocab_size - 1))


def _train_sentencepiece(path: Path, vocab_size: int, workers: int) -> int:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(path),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        num_threads=workers,
        max_sentence_length=1 << 20,
        user_defined_symbols=[END_OF_TEXT],
        character_coverage=0.9995,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()


def _documents(path: Path) -> Iterator[str]:
    rest = ""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while block := file.read(1 << 22):
            *documents, rest = (rest + block).split(END_OF_TEXT)
            yield from documents
    yield rest


class Coder(NamedTuple):
    """What a peer encodes and decodes with: one text in this thread, or a file's documents in all threads."""

    encode: Callable[[str], Any]
    decode: Callable[[list[int]], Any]
    encode_file: Callable[[Path], Any]  # -> ids by document; special tokens left out


def coders() -> dict[str, Callable[[Path, int], Coder]]:
    """By peer: make(folder, workers), the folder being as `compare` writes it."""
    return {
        "rooflight": _code_rooflight,
        "tiktoken": _code_tiktoken,
        "tokenizers": _code_tokenizers,
        "gigatoken": _code_gigatoken,
    }


def _code_rooflight(folder: Path, workers: int) -> Coder:
    tokenizer = Tokenizer.load(folder)

    def encode_file(path: Path) -> Any:
        tokenizer.encode_file(path, folder / "ids.bin", num_workers=workers)
        ids = read_token_file(folder / "ids.bin")[0]
        return [ids[~np.isin(ids, list(tokenizer.special_tokens.values()))]]

    return Coder(partial(tokenizer.encode, allowed_special="none"), tokenizer.decode, encode_file)


def _code_tiktoken(folder: Path, workers: int) -> Coder:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    pattern = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["pattern"]
    ranks = load_tiktoken_bpe(str(folder / "ranks.tiktoken"))
    encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    encode_batch = partial(encoding.encode_ordinary_batch, num_threads=workers)
    return Coder(encoding.encode_ordinary, encoding.decode, lambda path: encode_batch(list(_documents(path))))


def _code_tokenizers(folder: Path, workers: int) -> Coder:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Coder(
        lambda text: tokenizer.encode(text).ids,
        tokenizer.decode,
        lambda path: [encoding.ids for encoding in tokenizer.encode_batch_fast(list(_documents(path)))],
    )


def _code_gigatoken(folder: Path, workers: int) -> Coder:
    import gigatoken

    tokenizer = gigatoken.Tokenizer(folder / "tokenizer.json")
    return Coder(tokenizer.encode, tokenizer.decode, lambda path: tokenizer.encode_batch(list(_documents(path))))


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """{part: [wall seconds, processor seconds]} of the task's parts, what proves the result, and the peak of memory."""
    path, workers = Path(job["text"]), job["workers"]
    if job["task"] == "train":
        clock = Clock()
        size = trainers()[job["peer"]](path, job["vocab_size"], workers)
        return {"parts": {"train": clock.read()}, "proof": size, "peak_bytes": _peak()}
    coder = coders()[job["peer"]](Path(job["tokenizer"]), workers)
    coder.encode("a")  # what is built at the first call
    if job["task"] == "encode file":
        clock = Clock()
        ids = coder.encode_file(path)
        parts = {"encode file": clock.read()}
        return {"parts": parts, "proof": _digest(ids), "peak_bytes": _peak()}
    text = path.read_bytes().decode(errors="ignore")
    clock = Clock()
    ids = coder.encode(text)
    parts = {"encode": clock.read()}
    coder.encode(text)
    parts["encode again"] = clock.read()
    peak = _peak()
    proof = _digest([ids])
    ids = list(map(int, ids))
    short = [text[i : i + SHORT] for i in range(0, min(len(text), 2 * N_SHORT * SHORT), SHORT)]
    half = len(short) // 2
    for part in short[:half]:
        coder.encode(part)  # who encodes short texts has met most of their words
    clock = Clock()
    for part in short[half:]:
        coder.encode(part)
    parts["encode short"] = clock.read()
    coder.decode(ids)
    parts["decode"] = clock.read()
    return {"parts": parts, "proof": proof, "peak_bytes": peak}


class Clock:
    """Wall and processor seconds, those of ended children included, since the last reading."""

    def __init__(self) -> None:
        self._last = self._now()

    def read(self) -> list[float]:
        wall, own, others = self.read_apart()
        return [wall, own + others]

    def read_apart(self) -> list[float]:
        """Wall seconds, and processor seconds of this process and of ended children."""
        last, self._last = self._last, self._now()
        return [now - then for now, then in zip(self._last, last, strict=True)]

    @staticmethod
    def _now() -> tuple[float, ...]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), *(usage.ru_utime + usage.ru_stime for usage in used)


def _digest(documents: Iterable[Any]) -> str:
    """The same for the same ids, however they are cut into documents and held."""
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(np.asarray(ids, dtype=np.uint32).tobytes())
    return digest.hexdigest()


def _peak() -> int:
    """Bytes of the largest of this process and its children. (Linux counts in KiB, macOS in bytes.)"""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["out"]).write_text(json.dumps(measure(arguments)))
