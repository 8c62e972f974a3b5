"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434): one small latent holds keys and values.

    c_t = rms(W_c x_t)                        latent, (C,);   r_t = R_t W_r x_t      one rotated key for all heads, (R,)
    k_th, v_th = W_kh c_t, W_vh c_t           (N,) and (V,) a head;   (q_th, p_th) = W_qh x_t,  p rotated, (R,)
    y_t = W_o concat_h  sum_{s <= t} softmax_s((q_th . k_sh + R_t p_th . r_s) / sqrt(N + R)) v_sh

Decoding never builds keys and values. It absorbs W_kh into the query, q_th . W_kh c_s = (W_kh^T q_th) . c_s, and
applies W_vh once to the mixed latent. The query has no latent of its own, as in V2-Lite. Time O(T^2 D). The state grows
by C + R numbers a token, however many heads there are. The traps:
- The rotation needs a slice of its own, because an R_t between W_kh and c_s could not be absorbed.
- All heads share one rotated key.
- The scale is that of N + R, not of the latent that decoding works in.
- The state keeps the latent after its norm.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmx.parts.attention import causal_attention, past_bias, query_positions, write
from llmx.parts.checks import check_sizes
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.rotary import rotate, shared_table
from llmx.protocol import Context, Hidden, Site, StatefulMixer


class LatentState(NamedTuple):
    """The past, slot s for position s. A step writes it in place while gradients are off."""

    latent: Tensor  # (B, 1, S, C), normalised
    key: Tensor  # (B, 1, S, R), the shared rotated key


class LatentAttention(StatefulMixer[LatentState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: H.
        latent: C, width of the latent.
        head_dim: N, the part of a head that is not rotated, and V, the width of its value; dim / heads if not given.
        rotary_dim: R, the rotated part of a head; even. With 0 there are no positions (NoPE), as in Kimi Linear.
        rotary_base: base of the rotary frequencies.
        eps: of the latent's norm.
    """

    def __init__(
        self,
        site: Site,
        heads: int = 8,
        latent: int = 32,
        head_dim: int | None = None,
        rotary_dim: int = 8,
        rotary_base: float = 10000.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        if heads < 1 or (head_dim is None and site.dim % heads):
            raise ValueError(f"heads: {heads} heads must divide dim {site.dim}, where head_dim is not given")
        head_dim = site.dim // heads if head_dim is None else head_dim
        check_sizes(latent=latent, head_dim=head_dim)
        if rotary_dim < 0 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: {rotary_dim} is no even number from 0 on")
        self.heads = heads
        self.latent = latent
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.rotary_base = rotary_base
        self.query = nn.Linear(site.dim, heads * (self.head_dim + rotary_dim), bias=False)
        self.down = nn.Linear(site.dim, latent + rotary_dim, bias=False)
        self.norm = RMSNorm(latent, eps)
        self.up = nn.Linear(latent, 2 * heads * self.head_dim, bias=False)  # a head's key and value side by side
        self.out = nn.Linear(heads * self.head_dim, site.dim, bias=False)
        for linear in (self.query, self.down, self.up):
            normal_(linear)
        normal_(self.out, residual_std(site.depth))

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, rotated, latent, shared = self._project(x, context)
        key, value = self.up(latent).unflatten(-1, (self.heads, 2 * self.head_dim)).chunk(2, -1)
        key = torch.cat((key, shared[..., None, :].expand(*key.shape[:-1], -1)), -1)  # (B, T, H, N + R)
        query = torch.cat((query, rotated), -1)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        mixed = causal_attention(query, key, value)  # (B, H, T, V)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def init_state(self, batch_size: int, max_length: int) -> LatentState:
        latent = self.out.weight.new_zeros(batch_size, 1, max_length, self.latent)
        return LatentState(latent, latent.new_zeros(batch_size, 1, max_length, self.rotary_dim))

    def step(self, x: Tensor, state: LatentState, context: Context) -> tuple[Tensor, LatentState]:
        query, rotated, latent, shared = (part[:, None] for part in self._project(x, context))
        mixed, state = self._attend(query, rotated, latent, shared, state, context)
        return mixed[:, 0], state

    def prefill(self, x: Hidden, state: LatentState, context: Context) -> tuple[Hidden, LatentState]:
        return self._attend(*self._project(x, context), state, context)

    def _attend(
        self, query: Tensor, rotated: Tensor, latent: Tensor, shared: Tensor, state: LatentState, context: Context
    ) -> tuple[Hidden, LatentState]:
        """Attention of the T tokens of a prefill, or of the one token of a step, over the latents."""
        positions = query_positions(context)
        state = LatentState(
            write(state.latent, latent[:, :, None], positions), write(state.key, shared[:, :, None], positions)
        )
        latents, keys = state.latent.to(query.dtype), state.key.to(query.dtype)  # (B, 1, S, C), (B, 1, S, R)
        up_key, up_value = self.up.weight.view(self.heads, 2 * self.head_dim, self.latent).chunk(2, 1)  # (H, N, C)
        absorbed = torch.einsum("bthn,hnc->bhtc", query, up_key.to(query.dtype))
        scores = absorbed @ latents.transpose(-1, -2) + rotated.transpose(1, 2) @ keys.transpose(-1, -2)  # (B, H, T, S)
        bias = past_bias(context, latents.shape[2], scores.dtype)[:, 0]  # (B, 1, T, S)
        weights = (scores * (self.head_dim + self.rotary_dim) ** -0.5 + bias).softmax(-1)
        mixed = torch.einsum("bhtc,hnc->bthn", weights @ latents, up_value.to(query.dtype))
        return self.out(mixed.flatten(2)), state

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q (B, T, H, N), p rotated (B, T, H, R), latent c (B, T, C), shared, rotated r (B, T, R); no T in `step`."""
        table = shared_table(context, self.rotary_dim, self.rotary_base, x.dtype)  # (B, T, 1, 2, R / 2)
        heads = self.query(x).unflatten(-1, (self.heads, -1))
        query, rotated = heads.split((self.head_dim, self.rotary_dim), -1)
        latent, shared = self.down(x).split((self.latent, self.rotary_dim), -1)
        return query, rotate(rotated, table), self.norm(latent), rotate(shared[..., None, :], table)[..., 0, :]
