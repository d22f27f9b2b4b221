"""Eager PyTorch oracles and Triton kernels: RMSNorm, attention and their companions.

Every public function runs its Triton kernels on CUDA tensors, the same kernels interpreted on CPU tensors under
TRITON_INTERPRET=1, and eager PyTorch on plain CPU tensors.
"""

from . import cost, reference
from .attention import FlashAttentionFunction, flash_attention, flash_attention_varlen
from .attention.alibi import alibi_slopes
from .cross_entropy import CrossEntropyFunction, cross_entropy
from .fp8 import FP8LinearFunction, fp8_linear
from .gelu import GELUFunction, gelu
from .linear_cross_entropy import LinearCrossEntropyFunction, linear_cross_entropy
from .rms_norm import RMSNormFunction, rms_norm
from .rope import RoPEFunction, RoPEQKVFunction, rope, rope_qkv
from .rope_tables import RopeScaling, rope_tables
from .swiglu import SwiGLUFunction, SwiGLUJoinedFunction, swiglu
from .tiled import TiledAttentionFunction

__all__ = [
    "CrossEntropyFunction",
    "FP8LinearFunction",
    "FlashAttentionFunction",
    "GELUFunction",
    "LinearCrossEntropyFunction",
    "RMSNormFunction",
    "RoPEFunction",
    "RoPEQKVFunction",
    "RopeScaling",
    "SwiGLUFunction",
    "SwiGLUJoinedFunction",
    "TiledAttentionFunction",
    "alibi_slopes",
    "cost",
    "cross_entropy",
    "flash_attention",
    "flash_attention_varlen",
    "fp8_linear",
    "gelu",
    "linear_cross_entropy",
    "reference",
    "rms_norm",
    "rope",
    "rope_qkv",
    "rope_tables",
    "swiglu",
]
