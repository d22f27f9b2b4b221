"""A user's own table: what `rooflight bench tune` measured to be fastest on one GPU, kept in the user's cache folder.

One JSON file for each GPU, architecture and triton version. It is read once, at the first launch, and never written
from here; a file that is not as it should be is named in one warning and left out.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

__all__ = ["Identity", "Tile", "UserTable", "architecture", "table_of"]

FORMAT, VERSION = "rooflight-attention", 1
KERNELS, PASSES, PATHS = ("fwd", "dkdv", "dq"), ("forward", "backward"), ("hopper", "portable")


@dataclass(frozen=True)
class Tile:
    """BLOCK_M queries by BLOCK_N keys, and how the program is compiled."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Identity:
    """What a measurement holds for."""

    gpu: str
    architecture: str
    triton: str = triton.__version__

    @property
    def path(self) -> Path:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = re.sub(r"[^a-z0-9.]+", "-", f"{self.gpu} {self.architecture} triton {self.triton}".lower())
        return root / "rooflight" / f"attention-{name}.json"


@dataclass(frozen=True)
class UserTable:
    """tiles: by kernel ("fwd", "dkdv", "dq"), dtype and head size.  paths: by pass, dtype and head size."""

    tiles: Mapping[tuple[str, str, int], Tile] = field(default_factory=dict)
    paths: Mapping[tuple[str, str, int], str] = field(default_factory=dict)

    def to_dict(self, identity: Identity) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "format": FORMAT,
            "version": VERSION,
            **vars(identity),
            "tiles": [_key("kernel", key) | vars(tile) for key, tile in self.tiles.items()],
            "paths": [_key("pass", key) | {"path": path} for key, path in self.paths.items()],
        }

    @staticmethod
    def from_dict(content: Any, identity: Identity) -> UserTable:
        """Raises ValueError, naming the field, on anything that `to_dict` would not have written for this GPU."""
        expected = {"format": FORMAT, "version": VERSION, **vars(identity)}
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        for name, value in expected.items():
            if content.get(name) != value:
                raise ValueError(f"{name}: expected {value!r}, got {content.get(name)!r}")
        tiles, paths = {}, {}
        for entry in _list(content, "tiles"):
            sizes: list[Any] = [entry.get(name) for name in Tile.__dataclass_fields__]
            block_m, block_n, num_warps, num_stages = sizes
            if not (_power(block_m, 16, 256) and _power(block_n, 16, 256) and _power(num_warps, 1, 32)):
                raise ValueError(
                    f"tiles: expected powers of two, blocks from 16 to 256 and at most 32 warps, got {sizes}"
                )
            if not (type(num_stages) is int and 1 <= num_stages <= 8):
                raise ValueError(f"tiles: expected 1 to 8 stages, got {num_stages!r}")
            tiles[_read_key(entry, "kernel", KERNELS)] = Tile(block_m, block_n, num_warps, num_stages)
        for entry in _list(content, "paths"):
            if entry.get("path") not in PATHS:
                raise ValueError(f"paths: expected one of {PATHS}, got {entry.get('path')!r}")
            paths[_read_key(entry, "pass", PASSES)] = entry["path"]
        return UserTable(tiles, paths)


def _key(name: str, key: tuple[str, str, int]) -> dict[str, Any]:
    return {name: key[0], "dtype": key[1], "head_dim": key[2]}


def _read_key(entry: dict[str, Any], name: str, allowed: tuple[str, ...]) -> tuple[str, str, int]:
    first, dtype, head_dim = entry.get(name), entry.get("dtype"), entry.get("head_dim")
    if first not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {first!r}")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype!r}")
    if not (type(head_dim) is int and 1 <= head_dim <= 512):
        raise ValueError(f"head_dim: expected 1 to 512, got {head_dim!r}")
    return first, dtype, head_dim


def _list(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    entries = content.get(name)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{name}: expected a list of objects")
    return entries


def _power(number: Any, least: int, most: int) -> bool:
    return type(number) is int and least <= number <= most and number & (number - 1) == 0


def read(identity: Identity) -> UserTable:
    """The table in the file; empty where there is none. Raises ValueError, one sentence, on a broken file."""
    try:
        return UserTable.from_dict(json.loads(identity.path.read_bytes()), identity)
    except FileNotFoundError:
        return UserTable()
    except (OSError, ValueError) as error:
        raise ValueError(f"{identity.path}: not a table of `rooflight bench tune` for this GPU ({error})") from None


@cache
def table_of(device: torch.device) -> UserTable:
    """The user's table for a GPU, read once; empty for any other device, and with a warning for a broken file."""
    if device.type != "cuda":
        return UserTable()
    try:
        return read(Identity(torch.cuda.get_device_name(device), architecture()))
    except ValueError as error:
        warnings.warn(f"{error}; the tiles that ship are used: run `rooflight bench tune` anew", stacklevel=2)
        return UserTable()


def architecture() -> str:
    """The GPU that Triton compiles for: "sm_90", "gfx942"."""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]
