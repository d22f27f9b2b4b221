"""From a Hugging Face folder to a checkpoint and back, through the commands, and what generate and eval say of both."""

from __future__ import annotations

import json
import math
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rooflight.bench import model_commands
from rooflight.bench.cli import app
from rooflight.kernels import reference
from rooflight.model import ModelConfig, Transformer
from rooflight.model.evaluate import negative_log_likelihood
from rooflight.tokenizer import Tokenizer
from rooflight.training import pretrained
from rooflight.training.checkpoint import load_model, save_checkpoint

os.environ["HF_HUB_OFFLINE"] = "1"
TEXT = "In the beginning was the word, and the word was caf\u00e9 \u2014 \u65e5\u672c.\n" * 3


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    vocab = {0: b"<|endoftext|>"} | {i + 1: bytes([i]) for i in range(256)} | {257: b"th", 258: b"the"}
    return Tokenizer(vocab, [(b"t", b"h"), (b"th", b"e")], ["<|endoftext|>"])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A run whose vocabulary is padded past the tokenizer's, with padding that is drawn if it may be."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = Transformer(ModelConfig(272, 64, 1, 2, d_model=16, qk_norm=True))
    with torch.no_grad():
        model.output_weight[259:] *= 30
    save_checkpoint(folder / "checkpoints", model, [], step=3, tokenizer_hash=tokenizer.hash)
    tokenizer.save(folder / "tokenizer")
    (folder / "config.json").write_text('{"train_data": "x"}')  # a run's own, not Hugging Face's
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a plain CPU: what the commands do has nothing to do with the kernels, which the interpreter slows."""
    monkeypatch.setattr(pretrained, "open_model", partial(pretrained.open_model, ops=reference))


def rooflight(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_out_and_in_again(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rooflight("export-hf", run, "--out", tmp_path / "hf")
    model = load_model(run, ops=reference)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = words(TEXT, return_tensors="pt")["input_ids"][:, :60]
    assert ids[0].tolist() == tokenizer.encode(TEXT)[:60]
    assert theirs.generation_config.eos_token_id == words.eos_token_id == 0
    assert theirs.config.bos_token_id is None
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids))

    rooflight("import-hf", tmp_path / "hf", "--out", tmp_path / "back")
    assert load_model(tmp_path / "back").config == model.config
    other = Tokenizer({i: bytes([i]) for i in range(256)}, [])
    other.save(tmp_path / "other")
    refused = CliRunner().invoke(app, ["generate", str(tmp_path / "back"), "--tokenizer", str(tmp_path / "other")])
    assert f"was trained on tokens of the tokenizer {tokenizer.hash[:12]}" in str(refused.exception)
    seen = [
        rooflight(
            "generate", folder, "--prompt", "the caf\u00e9", "--max-new-tokens", 40, "--temperature", 2, "--seed", 1
        )
        for folder in (run, tmp_path / "hf", tmp_path / "back")
    ]
    assert seen[0] == seen[1] == seen[2]
    assert seen[0].startswith("the caf\u00e9")
    assert json.loads(rooflight("eval", tmp_path / "hf", run / "text.txt", "--json")) == json.loads(
        rooflight("eval", run, run / "text.txt", "--json")
    )


def test_eval_is_the_text_s_likelihood(run: Path, tokenizer: Tokenizer) -> None:
    model, ids = load_model(run, ops=reference), torch.tensor(tokenizer.encode(TEXT))
    nats = 0.0
    for i in range(1, len(ids)):  # each token from those of its window before it
        begin = (i - 1) // 64 * 64
        begin = min(begin, len(ids) - 1 - 64)  # the last window is whole
        with torch.no_grad():
            nats -= model(ids[None, begin:i])[0, -1].log_softmax(-1)[ids[i]].item()
    assert len(ids) - 1 > 2 * 64
    said = json.loads(rooflight("eval", run, run / "text.txt", "--json"))
    assert said["perplexity"] == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)
    assert said["bytes"] == len(TEXT.encode()) - 1
    assert said["bits_per_byte"] == pytest.approx(nats / math.log(2) / said["bytes"], rel=1e-5)
    assert "bits per byte" in rooflight("eval", run, run / "text.txt", "--stride", 16)


def test_eval_names_a_file_that_is_no_text(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"x\.png: expected text in UTF-8: .*byte 0x89 in position 0"):
        rooflight("eval", run, tmp_path / "x.png")


@pytest.mark.parametrize("stride", [1, 5, 8])
@pytest.mark.parametrize("n", [2, 9, 10, 40])
def test_every_prediction_is_counted_once(n: int, stride: int) -> None:
    model = Transformer(ModelConfig(7, 16, 1, 1, d_model=4), reference)
    with torch.no_grad():
        model.norm.weight.zero_()  # all tokens equally likely
    ids = torch.randint(7, (n,), generator=torch.Generator().manual_seed(0))
    found = negative_log_likelihood(model, ids, context_length=8, stride=stride)
    assert found == pytest.approx((n - 1) * math.log(7), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"context_length": 17}, "context_length: expected 1 .. 16"), ({"stride": 17}, "stride: expected 1 .. 16")],
)
def test_a_bad_argument_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        negative_log_likelihood(
            Transformer(ModelConfig(7, 16, 1, 1, d_model=4), reference), torch.arange(5), **arguments
        )


def test_generate_draws_no_id_that_the_tokenizer_lacks(run: Path, tokenizer: Tokenizer) -> None:
    text = rooflight("generate", run, "--prompt", "a", "--max-new-tokens", 60)
    assert len(text) > 10  # one token of padding, and decoding all of them would have failed


def test_generate_goes_as_far_as_the_context(run: Path) -> None:
    """64 positions: what they have no room for is said on standard error, and is no failure."""
    result = CliRunner().invoke(app, ["generate", str(run), "--prompt", "a" * 60, "--top-k", "1"])
    assert result.exit_code == 0
    assert result.stderr == "4 new tokens, not 200: the context of 64 has no room for more.\n"
    short = CliRunner().invoke(
        app, ["generate", str(run), "--prompt", "a" * 60, "--top-k", "1", "--max-new-tokens", "4"]
    )
    assert (short.stdout, short.stderr) == (result.stdout, "")

    result = CliRunner().invoke(app, ["generate", str(run), "--prompt", "b" * 40 + "a" * 32, "--top-k", "1"])
    assert result.exit_code == 0
    assert "72 tokens of prompt fill the context of 64; its last 32 count." in result.stderr
    assert "32 new tokens, not 200" in result.stderr
    last = rooflight("generate", run, "--prompt", "a" * 32, "--top-k", 1)
    assert result.stdout == "b" * 40 + last


def test_no_folder_that_holds_something_is_written_into(run: Path, tmp_path: Path) -> None:
    """A run's config.json, a checkpoint's weights, a downloaded model: all were replaced, with status 0."""
    rooflight("export-hf", run, "--out", tmp_path / "hf")
    before = {file: file.read_bytes() for top in (run, tmp_path) for file in top.rglob("*") if file.is_file()}
    step = run / "checkpoints" / "step-00000003"
    for out in (run, step, tmp_path / "hf", run / "text.txt"):
        for command in ("export-hf", run), ("import-hf", tmp_path / "hf"):
            with pytest.raises(ValueError, match=r"^out: .* (holds .*: expected a new folder|is a file)"):
                rooflight(*command, "--out", out)
    for source, out in ((tmp_path / "hf", tmp_path / "hf"), (run, run)):
        with pytest.raises(ValueError, match=r"^out: .* holds"):
            rooflight("export-hf", source, "--out", out, "--overwrite")
    assert before == {file: file.read_bytes() for file in before}
    rooflight("export-hf", run, "--out", tmp_path / "hf", "--overwrite")


def test_a_tokenizer_is_a_folder_or_a_file(run: Path) -> None:
    whole = [
        rooflight("generate", run, "-t", run / t, "--prompt", "the") for t in ("tokenizer", "tokenizer/tokenizer.json")
    ]
    assert whole[0] == whole[1]


def test_generate_stops_at_a_token_by_its_text(run: Path, tokenizer: Tokenizer) -> None:
    common = ("generate", run, "--prompt", "the", "--seed", 5, "--max-new-tokens", 40)
    whole = rooflight(*common)
    letter = next(c for c in whole[3:] if c.isascii() and c.isalnum())
    assert rooflight(*common, "--stop", letter) == whole[: whole.index(letter, 3)] + "\n"
    for name in ("th\u00e9", "", "thy"):
        with pytest.raises(ValueError, match=r"stop: expected the text of one token \(special: <\|endoftext\|>\)"):
            rooflight(*common, "--stop", name)


def test_generate_reads_its_prompt(run: Path) -> None:
    arguments = ["generate", str(run), "--top-k", "1", "--max-new-tokens", "5"]
    expected = rooflight(*arguments, "--prompt", "caf\u00e9\n")
    assert CliRunner().invoke(app, [*arguments, "--prompt", "-"], input="caf\u00e9\n").stdout == expected
    for wrong, message in ((["--prompt", ""], "prompt: expected"), (["--seed", str(2**64)], "seed: expected")):
        with pytest.raises(ValueError, match=message):
            rooflight(*arguments, *wrong)


def test_on_a_terminal_generate_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its input ends; Ctrl-C ends a sample and not the command."""
    typed, seen = iter(["one", "", "two", "three", EOFError()]), []

    def read(shown: str) -> str:
        line = next(typed)
        if isinstance(line, EOFError):
            raise line
        return line

    def answer(text: str) -> None:
        seen.append(text)
        if text == "two":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", read)
    model_commands._ask(answer)
    assert seen == ["one", "two", "three"]


def test_what_is_missing_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tokenizer there; name its folder with --tokenizer"):
        rooflight("generate", run / "checkpoints")
    with pytest.raises(FileNotFoundError, match=r"expected a Hugging Face folder, with a config\.json"):
        rooflight("import-hf", run / "checkpoints", "--out", tmp_path / "x")


def test_another_tokenizer_is_refused_by_its_hash(run: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of the same size, so that its ids would all be known to the model."""
    other = Tokenizer(tokenizer.vocab | {258: b"tho"}, [(b"t", b"h"), (b"th", b"o")], ["<|endoftext|>"])
    other.save(tmp_path)
    for command in (("generate", run), ("eval", run, run / "text.txt"), ("export-hf", run, "--out", tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"of the tokenizer {tokenizer.hash[:12]}, .* is {other.hash[:12]}"):
            rooflight(*command, "--tokenizer", tmp_path)
    assert not (tmp_path / "out").exists()
