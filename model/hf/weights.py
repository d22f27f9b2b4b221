"""A folder's tensors: model.safetensors, or the shards that model.safetensors.index.json lists; and their names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Longer names first. A norm's name in their files depends on what other norms a block has.
RENAMED = {
    "embedding.": "embed_tokens.",
    "attention_norm.": "input_layernorm.",
    "attention_post_norm.": "post_attention_layernorm.",
    "ffn_norm.": "pre_feedforward_layernorm.",
    "ffn_post_norm.": "post_feedforward_layernorm.",
    "attention.": "self_attn.",
    "ffn.": "mlp.",
}
JOINED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def places(tensors: Mapping[str, Tensor], norm_placement: str, joined: bool) -> dict[str, list[Tensor]]:
    """Our tensors under their names in a checkpoint, those that are one matrix there together, in the order of rows.

    layers.0.attention.q_proj.weight is model.layers.0.self_attn.q_proj.weight, or the first of .qkv_proj.weight.
    """
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if norm_placement == "pre":
            name = name.replace("ffn_norm.", "post_attention_layernorm.")
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        parts = name.split(".")
        if joined and len(parts) > 1 and parts[-2] in JOINED:
            name = ".".join([*parts[:-2], JOINED[parts[-2]], parts[-1]])
        found.setdefault(name if name.startswith("lm_head.") else f"model.{name}", []).append(tensor)
    return found


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises FileNotFoundError, or ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint directory") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


class Weights:
    """The tensors of a checkpoint's folder, each read when it is asked for.

    As transformers does, model.safetensors comes before an index. Raises FileNotFoundError on a missing file,
    ValueError naming the file on one that is cut off or no index.
    """

    def __init__(self, directory: Path) -> None:
        single = directory / WEIGHTS
        files = [single] if single.exists() or not (directory / INDEX).exists() else _shards(directory)
        self.files: dict[str, Any] = {}  # a tensor's name, and the open file that holds it
        for file in files:
            if not file.exists():
                raise FileNotFoundError(f"{file}: no such file; expected the checkpoint's safetensors")
            try:
                opened = safe_open(file, framework="pt")
                self.files |= dict.fromkeys(opened.keys(), opened)
            except SafetensorError as error:
                raise ValueError(f"{file}: not a whole safetensors file ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


def _shards(directory: Path) -> list[Path]:
    index = read_json(directory / INDEX)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ValueError(f"{directory / INDEX}: expected a weight_map of tensors and files")
    return [directory / name for name in sorted(set(found.values()))]


def write(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Put model.safetensors into the folder, whole or not at all, and remove the index and shards it replaces."""
    partial = directory / f".{WEIGHTS}.{os.getpid()}"
    try:
        with as_os_errors(f"could not write {directory / WEIGHTS}: "):
            save_file(dict(weights), partial, metadata={"format": "pt"})
        replace(partial, directory / WEIGHTS)
    finally:
        partial.unlink(missing_ok=True)
    if (directory / INDEX).exists():
        # the index goes first: without it nothing reads a shard
        try:
            old = [shard for shard in _shards(directory) if shard.parent == directory and shard.name != WEIGHTS]
        except ValueError:
            old = []
        (directory / INDEX).unlink()
        for shard in old:
            shard.unlink(missing_ok=True)


@contextmanager
def as_os_errors(before: str = "") -> Iterator[None]:
    """torch and safetensors have errors of their own for a file that cannot be written; the cause is an OSError's.

    before: what its message begins with.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        failure = OSError(f"{before}{cause}")
        told = re.search(r"os error (\d+)", str(cause))  # safetensors' way
        failure.errno = cause.errno if isinstance(cause, OSError) else int(told[1]) if told else None
        raise failure from error


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace(partial: Path, target: Path) -> None:
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, target)
