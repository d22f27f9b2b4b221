"""Eager PyTorch oracles and Triton kernels: RMSNorm, attention and their companions."""
