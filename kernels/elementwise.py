"""Elementwise functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh from one exponential (the interpreter has no libdevice), relative error of a few ulps in fp32."""
    e = tl.math.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2 |x|), never overflows
    y = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    if x.dtype == tl.float32:
        # 1 - e cancels for small x: the odd series to x^11 is exact to fp32 below 1/4
        x2 = x * x
        series = x2 * (62.0 / 2835.0 + x2 * (-1382.0 / 155925.0))
        series = x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0) + x2 * series))
        y = tl.where(tl.abs(x) < 0.25, x + x * series, y)
    return y
