"""A causal convolution as long as the text, by fast Fourier transforms: O(T log T) a channel.

The trap: a product of spectra is a circular convolution, where the end of the text wraps round to its beginning and
every position sees the future. Both sides are padded with zeros to 2 T. Only rounding is left of the future.
"""

import torch
from torch import Tensor


def long_convolution(u: Tensor, taps: Tensor) -> Tensor:
    """sum_{s <= t} taps_{t-s} * u_s: u (B, T, D), taps (T, D) -> (B, T, D), in the dtype of the taps."""
    length = u.shape[1]
    u, taps = u.to(taps.dtype).transpose(1, 2).contiguous(), taps.t().contiguous()  # transforms run along memory
    spectrum = torch.fft.rfft(u, 2 * length) * torch.fft.rfft(taps, 2 * length)
    return torch.fft.irfft(spectrum, 2 * length)[..., :length].transpose(1, 2)
