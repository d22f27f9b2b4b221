"""What is read of each kind of file, whatever parts and blocks it is cut into; and what is wrong with it, by place."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from rooflight.tokenizer.corpus.documents import Lines, Range, Rows, Text, blocks, documents
from rooflight.tokenizer.corpus.parts import Span, check_shard, find_files, parts
from rooflight.tokenizer.inputs import open_text, place
from rooflight.tokenizer.pretokenize import Cutter, Specials

CUTTER = Cutter(Specials(["<|eod|>"]))
# Line ends inside a text, escapes, an astral character as JSON escapes it, white space alone, nothing, null.
TEXTS = ["the cat\nsat ", 'naïve 日本語\r\n\t"quoted"', "😀" * 9, " ", "", None, "x" * 3000, "\u2028 \x85 end"] * 4
FOUND = [text or "" for text in TEXTS]


def json_lines(texts: list, field: str = "text") -> bytes:
    lines = [json.dumps({"id": n, field: text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)]
    return "\r\n\n".join(lines).encode() + b"\n" * (len(texts) % 2)


def parquet(texts: list, field: str = "text") -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    written = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), written, row_group_size=5)
    return written.getvalue()


def zstd(data: bytes) -> bytes:
    compress = pytest.importorskip("zstandard").ZstdCompressor().compress
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0size"  # as pzstd has them
    return skipped + compress(data[:100]) + compress(data[100:]) + skipped  # two frames, as `cat a.zst b.zst` has


def read(path: Path, n: int, size: int) -> list:
    """The file's blocks, of n spans."""
    n_bytes = path.stat().st_size
    found = []
    for k in range(n):
        span = Span(str(path), k, n, n_bytes * (k + 1) // n - n_bytes * k // n)
        of_span = list(blocks(span, CUTTER, size, "text"))
        found += [block for block, _ in of_span]
        if n == 1 or path.suffix == ".parquet":
            assert sum(n_read for _, n_read in of_span) in ((span.size,) if of_span else (0, span.size))
    return found


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "X.JSONL", "x.json", "x.jsonl.gz", "x.json.zst", "x.parquet"])
def test_documents_of_lines_and_rows(tmp_path: Path, name: str, n: int, size: int) -> None:
    path = tmp_path / name
    data = parquet(TEXTS) if name.endswith("parquet") else json_lines(TEXTS)
    if path.suffix in (".gz", ".zst"):
        data = gzip.compress(data[:500]) + gzip.compress(data[500:]) + bytes(9) if ".gz" in name else zstd(data)
        n = 1  # nothing else is asked of a compressed file
    path.write_bytes(data)
    found = read(path, n, size)
    assert {type(block) for block in found} == {Rows if name.endswith("parquet") else Lines}
    assert [text for block in found for text in documents(block, "text")] == FOUND
    if size == 1 and not name.endswith("parquet"):
        assert len(found) > len(TEXTS)


@pytest.mark.parametrize("n", [2, 5, 10, 20, 40])
def test_spans_that_begin_where_a_line_does(tmp_path: Path, n: int) -> None:
    (tmp_path / "x.jsonl").write_text("".join(f'{{"text": "{k:02}"}}\n' for k in range(20)))
    found = [text for block in read(tmp_path / "x.jsonl", n, 30) for text in documents(block, "text")]
    assert found == [f"{k:02}" for k in range(20)]


@pytest.mark.parametrize("size", [1, 100, 1 << 20])
@pytest.mark.parametrize(("name", "n"), [("x.txt", 1), ("x.md", 7), ("x.txt.gz", 1), ("x.zst", 1)])
def test_text_is_cut_where_it_may_be(tmp_path: Path, name: str, n: int, size: int) -> None:
    text = ("the cat sat<|eod|>naïve 日本語, 1234\n" * 90).encode() + b"\xff\x00"
    data = gzip.compress(text) if name.endswith("gz") else zstd(text) if name.endswith("zst") else text
    (tmp_path / name).write_bytes(data)
    found = read(tmp_path / name, n, size)
    assert {type(block) for block in found} == {Range if name in ("x.txt", "x.md") else Text}
    assert b"".join(block.read() for block in found) == text
    assert [block.ends for block in found] == [False] * (len(found) - 1) + [True]
    if size < 1000:
        assert len(found) > 10
    for block in found[:-1]:
        assert block.read()[-1:].isalnum()


def test_a_byte_order_mark_and_lone_surrogates_in_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ude00\\udc00b"}')
    (block,) = read(tmp_path / "x.jsonl", 1, 1000)
    assert documents(block, "text") == ["a\ufffd", "😀\ufffdb"]


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "is no JSON, expected an object on each line"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"test": "a", "id": 1}', "has no field 'text', .* got 'test', 'id'"),
        (b"{}", "has no field 'text', .* got none"),
        (b'"text"', "has no field 'text', .* got str"),
        (b"null", "has no field 'text', .* got NoneType"),
        (b'{"text": ["a"]}', "has list in the field 'text', expected text"),
        (b'{"text": "\xff"}', "is no UTF-8"),
    ],
)
@pytest.mark.parametrize(("n", "size"), [(1, 1 << 20), (1, 20), (7, 20)])
def test_what_is_wrong_with_a_line(tmp_path: Path, line: bytes, message: str, n: int, size: int) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD * 20 + b"\n" + line + b"\n" + GOOD * 20)
    with pytest.raises(ValueError, match=rf"x\.jsonl, line 22: {message}"):
        [documents(block, "text") for block in read(path, n, size)]


@pytest.mark.parametrize("make", [gzip.compress, zstd])
def test_damaged_compressed_files(tmp_path: Path, make) -> None:
    data = make(os.urandom(50_000))
    # (Zeros inside: a checksum or a block that is none.)
    for wrong, what in ((data[:-5], "cut off"), (data[:200], "cut off"), (data + b"PK", "damaged")):
        (tmp_path / "x.txt.gz").write_bytes(wrong)
        with pytest.raises(ValueError, match=rf"x\.txt\.gz' is {what}"), open_text(tmp_path / "x.txt.gz") as file:
            file.read()
    spoiled = bytearray(gzip.compress(b"the cat" * 1000))
    spoiled[-6] ^= 1  # its length, behind the text
    (tmp_path / "x.txt.gz").write_bytes(spoiled)
    with pytest.raises(ValueError, match="damaged"), open_text(tmp_path / "x.txt.gz") as file:
        file.read()


def test_what_is_no_text_inside_a_compressed_file(tmp_path: Path) -> None:
    tar = b"name".ljust(257, b"\0") + b"ustar\x0000"
    for inside, what in ((tar, "a tar archive"), (gzip.compress(b"a"), "compressed twice"), (b"PAR1...", "Parquet")):
        (tmp_path / "x.gz").write_bytes(gzip.compress(inside))
        with pytest.raises(ValueError, match=rf"x\.gz' is {what}" if what != "Parquet" else "a Parquet file"):
            open_text(tmp_path / "x.gz")


def test_columns_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(parquet(["a", "b"], "content"))
    assert documents(next(blocks(Span(str(path)), CUTTER, 10, "content"))[0], "content") == ["a", "b"]
    for field, message in (("text", "no column 'text', but 'id', 'content'"), ("id", "int in the column 'id'")):
        with pytest.raises(ValueError, match=rf"x\.parquet': has {message}"):
            list(blocks(Span(str(path)), CUTTER, 10, field))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"x\.parquet'"):
        list(blocks(Span(str(path)), CUTTER, 10, "content"))


@pytest.mark.parametrize(("name", "module"), [("x.parquet", "pyarrow"), ("x.jsonl.zst", "zstandard")])
def test_a_missing_module_is_named_with_the_extra(
    tmp_path: Path, name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent in (module, "compression.zstd"):
        monkeypatch.setitem(sys.modules, absent, None)
    (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd....")
    with pytest.raises(ImportError, match=rf"{name}.* {module} reads: pip install 'rooflight\[data\]'"):
        list(blocks(Span(str(tmp_path / name)), CUTTER, 10, "text"))


def test_files_of_folders(tmp_path: Path) -> None:
    taken = ["a.txt", "b/c.JSONL", "b/d.json.gz", "b/e.ndjson.zst", "f.parquet", "g.txt.gz"]
    others = ["README.md", "b/info.json", "b/x.parquet.gz", "y.gz", ".hidden.txt", ".git/z.txt"]
    for name in taken + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a")
    found, left_out = find_files([tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [*taken[:1], *taken[4:], *taken[1:4]]  # sorted
    assert {path.relative_to(tmp_path).as_posix() for path in left_out} == set(others[:4])
    assert find_files([tmp_path / "README.md"])[0] == [tmp_path / "README.md"]  # named
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "there").symlink_to(tmp_path / "b")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "b")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    linked = find_files([tmp_path / "elsewhere"])[0]
    assert [path.relative_to(tmp_path / "elsewhere").as_posix() for path in linked] == [
        path.replace("b/", "again/") for path in taken[1:4]
    ]
    shutil.rmtree(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe")
    for inputs, error, message in (
        ([tmp_path, tmp_path / "a.txt"], ValueError, "a.txt is given twice"),
        ([tmp_path / "link", tmp_path / "a.txt"], ValueError, "a.txt is given twice, as .*link before"),
        ([tmp_path / "none"], FileNotFoundError, "none"),
        ([tmp_path / ".git"], None, ""),
        ([], ValueError, "got no file"),
        ([tmp_path / "pipe"], ValueError, "is a pipe"),
    ):
        if error:
            with pytest.raises(error, match=message):
                find_files(inputs)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no \.txt, \.jsonl"):
        find_files([tmp_path / "empty"])


def test_parts_hold_every_byte_once(tmp_path: Path) -> None:
    sizes = {"a.txt": 10, "b.txt": 0, "c.txt": 950, "d.txt.gz": 500, "e.parquet": 401, "f.txt": 60, "g.txt": 41}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(bytes(size))
    made = parts([tmp_path / name for name in sizes], 100)
    spans = [span for part in made for span in part]
    for name, size in sizes.items():
        of_file = [span for span in spans if span.path == str(tmp_path / name)]
        assert sum(span.size for span in of_file) == size
        assert [(span.k, span.n) for span in of_file] == [(k, len(of_file)) for k in range(len(of_file))]
    assert [len(part) for part in made] == [1] * (1 + 10 + 1 + 13) + [1, 1]
    assert [len(part) for part in parts([tmp_path / name for name in sizes], 10_000)] == [6]


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 0)])
def test_shards_that_are_none(shard: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected I/N with 0 <= I < N"):
        check_shard(shard)


def test_next_to_nothing_is_read_ahead(tmp_path: Path) -> None:
    """What is decompressed is used before more is: 10 MB come of 10 KB."""
    path = tmp_path / "x.txt.gz"
    path.write_bytes(gzip.compress(b"a b " * 2_500_000) + gzip.compress(os.urandom(1 << 17)))
    with open_text(path) as file:
        assert file.read(8) == b"a b a b "
        assert place(file) <= 1 << 14


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"a b " * 100)
    block, _ = next(blocks(Span(str(path)), CUTTER, 1 << 20))
    os.truncate(path, 60)
    with pytest.raises(OSError, match=r"text\.txt became shorter while it was read"):
        block.read()
