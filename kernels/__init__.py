"""Eager PyTorch oracles and Triton kernels: RMSNorm, attention and their companions.

Every public function runs its Triton kernels on CUDA tensors, the same kernels interpreted on CPU tensors under
TRITON_INTERPRET=1, and the eager oracle of `reference` on plain CPU tensors.
"""

from . import cost, reference
from .attention import FlashAttentionFunction, flash_attention, flash_attention_varlen
from .reference import (
    cross_entropy,
    linear_cross_entropy,
    rope,
    swiglu,
)
from .rms_norm import RMSNormFunction, rms_norm

__all__ = [
    "FlashAttentionFunction",
    "RMSNormFunction",
    "cost",
    "cross_entropy",
    "flash_attention",
    "flash_attention_varlen",
    "linear_cross_entropy",
    "reference",
    "rms_norm",
    "rope",
    "swiglu",
]
