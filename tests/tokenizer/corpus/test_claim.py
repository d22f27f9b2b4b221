"""A folder belongs to the corpus that is being made in it, before its first shard is there too."""

from __future__ import annotations

from pathlib import Path

import pytest

from rooflight.tokenizer import Tokenizer
from rooflight.tokenizer.corpus import prepare
from support import bpe_reference

EOD = "<|endoftext|>"
TEXT = f"the cat sat on the mat{EOD}" * 20
TOKENIZER = Tokenizer(*bpe_reference.train(TEXT, 20), [EOD])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_jobs_of_other_corpora_do_not_meet_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "out"
    done, met = prepare._done, []

    def run(**options) -> None:
        prepare.prepare(TOKENIZER, [tmp_path / "a.txt"], out, num_workers=1, **options)

    def meanwhile(*args):  # a job has the folder, and has written no shard
        monkeypatch.setattr(prepare, "_done", done)
        for options in ({"eod": None}, {"shard_tokens": 5}):
            with pytest.raises(ValueError, match=r"holds a corpus of other (eod|shard_tokens), .* or another folder"):
                run(**options)
        run()  # a job of the same corpus
        met.append(contents(out))
        return done(*args)

    monkeypatch.setattr(prepare, "_done", meanwhile)
    run()
    assert met == [contents(out)]
    for path in out.glob("shard-*"):
        path.unlink()
    run(eod=None)  # nobody is at work on the other one any more
