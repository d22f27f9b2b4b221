"""The transformer, its presets, generation with a KV cache, and its closed-form estimates."""

from .ceilings import Ceilings
from .config import PRESETS, ModelConfig, preset
from .estimate import Estimate, estimate
from .generate import generate
from .transformer import Transformer

__all__ = ["PRESETS", "Ceilings", "Estimate", "ModelConfig", "Transformer", "estimate", "generate", "preset"]
