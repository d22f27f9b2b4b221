"""The transformer, its presets, generation with a KV cache, and its closed-form estimates."""

from .config import PRESETS, ModelConfig, preset
from .generate import generate
from .transformer import Transformer

__all__ = ["PRESETS", "ModelConfig", "Transformer", "generate", "preset"]
