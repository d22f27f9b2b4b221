"""What a result names beside itself, wherever it is measured."""

import platform
from pathlib import Path

import pytest

from rooflight.bench.cases import here


def test_without_git_or_a_list_of_processors_there_is_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "read_text", missing)
    assert here.commit() == "unknown"
    assert here.processor() in (platform.processor(), platform.machine(), "unknown CPU")
