"""Attention: the public functions and the Triton kernels behind them."""
