"""Chunks: pre-tokenised apart they give what the whole text gives, wherever the sizes put the cuts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rooflight.tokenizer.pretokenize import GPT2_PATTERN, SEPARATOR, Specials, pretokenize
from rooflight.tokenizer.pretokenize.chunks import Cutter, cut_stream, document_chunks, file_ranges

# Special tokens that overlap themselves, each other, and text that looks like a cut.
SPECIALS = ["<|e|>", "a b", "aa", "é.é", "<|e|>a"]
PIECES = [
    b"a",
    b"b ",
    b" ",
    b"a b",
    b"aa",
    b".",
    b"'s",
    b"9,",
    b"<|e|>",
    "é".encode(),
    "é.é".encode(),
    b"\n",
    b"\xe5\x80",
    b"\xff",
]
BYTES = st.lists(st.sampled_from(PIECES), max_size=60).map(b"".join)
PATTERNS = st.sampled_from([GPT2_PATTERN, r"\w+|\W+", r"(?<=a).|.+?"])


def whole(data: bytes, cutter: Cutter) -> list[bytes]:
    return pretokenize(cutter.mask(data), cutter.pattern).tolist()


def in_chunks(path, cutter: Cutter, range_size: int, chunk_size: int) -> list[bytes]:
    found = []
    for start, stop in file_ranges(path, cutter, range_size):
        for chunk in cut_stream([path.read_bytes()[start:stop]], cutter, chunk_size):
            found += pretokenize(cutter.mask(chunk), cutter.pattern).tolist()
    return found


@given(
    data=BYTES,
    specials=st.sets(st.sampled_from(SPECIALS)),
    pattern=PATTERNS,
    sizes=st.tuples(*[st.integers(1, 40)] * 2),
)
def test_chunks_of_a_file_equal_the_whole(tmp_path_factory, data, specials, pattern, sizes):
    path = tmp_path_factory.mktemp("chunks") / "text"
    path.write_bytes(data)
    cutter = Cutter(Specials(sorted(specials)), pattern)
    assert in_chunks(path, cutter, *sizes) == whole(data, cutter)


@given(
    documents=st.lists(
        st.lists(st.sampled_from(["a", "b ", "a b", "aa", ".", "é", "é.é", "\n"]), max_size=20).map("".join)
    ),
    specials=st.sets(st.sampled_from(SPECIALS)),
    size=st.integers(1, 30),
)
def test_chunks_of_documents_equal_the_documents(documents, specials, size):
    cutter = Cutter(Specials(sorted(specials)))
    found = [token for chunk in document_chunks(documents, cutter, size) for token in pretokenize(chunk).tolist()]
    expected = [token for document in documents for token in whole(document.encode(), cutter)]
    # Neither the order of the chunks nor a separator more or less between documents counts.
    words = [sorted(token for token in tokens if token != SEPARATOR) for tokens in (found, expected)]
    assert words[0] == words[1]


def test_sizes_are_kept(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"word and word, " * 10_000)
    cutter = Cutter(Specials(["<|endoftext|>"]))
    ranges = file_ranges(path, cutter, 40_000)
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 150_000
    assert all(40_000 <= stop - start < 40_010 for start, stop in ranges[:-1])
    chunks = list(cut_stream([path.read_bytes()], cutter, 1_000))
    assert b"".join(chunks) == path.read_bytes()
    assert all(1_000 <= len(chunk) < 1_010 for chunk in chunks[:-1])


def test_a_stretch_without_cuts_is_searched_in_linear_steps(monkeypatch):
    blocks = [*[b"a" * 1_000] * 1_000, *[b" b" * 500] * 2]
    cutter = Cutter(Specials([]))
    searched = 0
    find = Cutter.find

    def counting(self, data, at):
        nonlocal searched
        searched += len(data) - at
        return find(self, data, at)

    monkeypatch.setattr(Cutter, "find", counting)
    assert b"".join(cut_stream(blocks, cutter, 1_000)) == b"".join(blocks)
    assert searched < 2_100_000


def test_an_empty_file_has_no_ranges(tmp_path):
    (tmp_path / "empty").touch()
    assert file_ranges(tmp_path / "empty", Cutter(Specials([]))) == []


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder, expected a text file"):
        file_ranges(tmp_path, Cutter(Specials([])))


def test_a_document_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="documents: got bytes, expected str"):
        list(document_chunks([b"text"], Cutter(Specials([]))))
