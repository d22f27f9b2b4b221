"""The transformer, its presets, generation with a KV cache, and its closed-form estimates."""

from .ceilings import Ceilings
from .config import PRESETS, ModelConfig, preset
from .estimate import Estimate, estimate
from .generate import generate, stream
from .hf import load_hf, save_hf
from .transformer import Transformer

__all__ = [
    "PRESETS",
    "Ceilings",
    "Estimate",
    "ModelConfig",
    "Transformer",
    "estimate",
    "generate",
    "load_hf",
    "preset",
    "save_hf",
    "stream",
]
