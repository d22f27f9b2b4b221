"""A stream of text is encoded in next to no memory, as Stanford CS336's test of encode_iterable asks."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from rooflight.tokenizer import Tokenizer, train_bpe

END = "<|endoftext|>"

# One megabyte more of address space than when the tokenizer was ready. What allocates more is a MemoryError.
SCRIPT = """
import resource, sys
from pathlib import Path
from rooflight.tokenizer import Tokenizer

tokenizer = Tokenizer.load(sys.argv[1])
encoders = {"encode": lambda lines: tokenizer.encode("".join(lines)), "encode_iterable": tokenizer.encode_iterable}
with open(sys.argv[2], encoding="utf-8") as lines:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_500_000, resource.RLIM_INFINITY))
    try:
        n = total = 0
        for i in encoders[sys.argv[3]](lines):
            n += 1
            total += i
        print(n, total)
    except MemoryError:
        print("MemoryError")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and 5 MB of lines over 20,000 different words, as unevenly frequent as a language's (Zipf's law)."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfé日", k=rng.randrange(1, 14))) for _ in range(20_000)]
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))
    folder = tmp_path_factory.mktemp("stream")
    text = []
    size = 0
    while size < 5_000_000:
        text.append(" ".join(rng.choices(words, cum_weights=weights, k=20)) + rng.choice(["\n", ".\n", f"\n{END}\n"]))
        size += len(text[-1].encode())
    (folder / "text.txt").write_text("".join(text), encoding="utf-8")
    (folder / "part.txt").write_text("".join(text[:3000]), encoding="utf-8")
    vocab, merges = train_bpe(folder / "part.txt", 2000, [END], num_workers=1)
    Tokenizer(vocab, merges, [END]).save(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
@pytest.mark.parametrize("how", ["encode_iterable", "encode"])
def test_a_stream_takes_less_than_1_5_megabytes_more(folder: Path, how: str) -> None:
    command = [sys.executable, "-c", SCRIPT, folder, folder / "text.txt", how]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    # Of the 1.5 MB it takes 0.7 to 0.8, by how the allocator's heap happens to lie. A whole text needs more than 3, or
    # the limit would limit nothing.
    ids = Tokenizer.load(folder).encode((folder / "text.txt").read_text(encoding="utf-8"))
    assert shown == (f"{len(ids)} {sum(ids)}" if how == "encode_iterable" else "MemoryError")
