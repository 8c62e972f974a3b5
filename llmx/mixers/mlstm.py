"""mLSTM, the matrix memory of xLSTM (arXiv 2405.04517), in the layer of xLSTM-7B (arXiv 2503.13427).

    i_t = W_i x_t + b,  f_t = W_f x_t + b  a head, soft-capped;     m_t = max(log sigmoid(f_t) + m_{t-1}, i_t)
    C_t = exp(log sigmoid(f_t) + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t v_t^T    (K, V), K = D / (2 H), V = D / H
    n_t = the same of k_t alone (K,),        h_t = C_t^T q_t / max(|n_t . q_t|, exp(-m_t)),  q_t scaled by K^(-1/2)
    y_t = W_o (sigmoid(W_g x_t) * norm_h(h_t))                      norm_h: LayerNorm over the V channels of a head

The input gate is an exponential without bound, so memory and normaliser are kept divided by exp(m), where m is the
largest exponent so far. h does not depend on m. Time O(T (c + K) D), memory O(T c) a head for chunks of c = 32. The
state is C, n and m, (K V + K + 1) H numbers. The traps: the 1 of the unscaled max(|n . q|, 1) has to be divided too,
into exp(-m), or h changes with m. A chunk needs the m of each of its rows, that of the memory before it included.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmx.parts.checks import head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.linear_attention import carry, chunked, joined
from llmx.parts.norm import HeadNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.protocol import Context, Hidden, PrefillMixer, Site

EPS = 1e-6  # added to the normaliser


class MLSTMState(NamedTuple):
    memory: Tensor  # (B, H, K, V), C
    normalizer: Tensor  # (B, H, K), n
    stabilizer: Tensor  # (B, H), m


class MLSTM(PrefillMixer[MLSTMState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: twice as many must divide `dim`.
        gate_cap: bound on the logits of input and forget gate, cap tanh(logit / cap); above 0.
    """

    def __init__(self, site: Site, heads: int = 4, gate_cap: float = 15.0):
        super().__init__()
        if gate_cap <= 0:
            raise ValueError(f"gate_cap: {gate_cap} is not above 0")
        self.heads = heads
        self.head_dim = head_width(site.dim, heads, even=True)  # V
        self.dim = site.dim
        self.gate_cap = gate_cap
        self.project = nn.Linear(site.dim, 3 * site.dim, bias=False)  # query and key of half the width, value, W_g
        self.gates = nn.Linear(site.dim, 2 * heads)  # i and f
        self.norm = HeadNorm(heads, self.head_dim, eps=1e-6)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():  # the input gates near 1, the forget gates from 0.95 to 0.998
            self.gates.bias[:heads].normal_(std=0.1)
            self.gates.bias[heads:].copy_(torch.linspace(3, 6, heads))

    def init_state(self, batch_size: int, max_length: int) -> MLSTMState:
        memory = exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim // 2, self.head_dim)
        return MLSTMState(memory, memory[..., 0].clone(), memory[..., 0, 0].clone())

    def step(self, x: Tensor, state: MLSTMState, context: Context) -> tuple[Tensor, MLSTMState]:
        query, key, value, gate, input_gate, log_forget = self._project(x)
        query, key, value = (part.to(state.memory.dtype) for part in (query, key, value))
        past = log_forget + state.stabilizer
        stabilizer = torch.maximum(past, input_gate).detach()  # (B, H); h does not depend on it
        keep, write = (past - stabilizer).exp(), (input_gate - stabilizer).exp()
        memory = keep[..., None, None] * state.memory + write[..., None, None] * key[..., None] * value[..., None, :]
        normalizer = keep[..., None] * state.normalizer + write[..., None] * key
        read = (memory * query[..., None]).sum(-2)  # (B, H, V)
        weight = torch.maximum((normalizer * query).sum(-1).abs(), (-stabilizer).exp())  # (B, H)
        mixed = (read / (weight + EPS)[..., None]).to(gate.dtype)
        return self.out(torch.sigmoid(gate) * self.norm(mixed)), MLSTMState(memory, normalizer, stabilizer)

    def prefill(self, x: Hidden, state: MLSTMState | None, context: Context) -> tuple[Hidden, MLSTMState]:
        query, key, value, gate, input_gate, log_forget = self._project(x)
        mixed, state = mlstm(query, key, value, input_gate, log_forget, state)
        return self.out(torch.sigmoid(gate) * self.norm(mixed)), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, T, H, K), v (B, T, H, V), W_g x (B, T, H V); i, log sigmoid(f) (B, T, H), exact. No T in `step`."""
        half = self.dim // 2
        query, key, value, gate = self.project(x).split((half, half, self.dim, self.dim), -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in (query, key, value))
        logits = at_least_float32(self.gates(x))
        input_gate, forget = (self.gate_cap * torch.tanh(logits / self.gate_cap)).chunk(2, -1)
        return query * query.shape[-1] ** -0.5, key, value, gate, input_gate, F.logsigmoid(forget)


def mlstm(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    input_gate: Tensor,
    log_forget: Tensor,
    state: MLSTMState | None = None,
    chunk: int = 32,
) -> tuple[Tensor, MLSTMState]:
    """The recurrence in chunks, from nothing or from any state.

    query, key (B, T, H, K), value (B, T, H, V), i and log sigmoid(f) (B, T, H) -> h (B, T, H, V) in the dtype of the
    value, and the state. No exponent is above 0: each is taken relative to the m of the token that reads.
    """
    time, width = value.shape[1], value.shape[-1]
    chunk = min(chunk, time)
    with torch.autocast(value.device.type, enabled=False):
        missing = -time % chunk
        log_forget = F.pad(log_forget, (0, 0, 0, missing))  # after the last token nothing fades and nothing comes
        input_gate = F.pad(input_gate, (0, 0, 0, missing), value=float("-inf"))
        start = log_forget[:, 0].new_zeros(log_forget[:, 0].shape) if state is None else state.stabilizer  # (B, H)
        with torch.no_grad():  # m_t = F_t + max(m_0, max_{s <= t} (i_s - F_s)), F the sums of log_forget
            sums = log_forget.cumsum(1)
            highest = torch.maximum((input_gate - sums).cummax(1).values, start[:, None]) + sums  # (B, N c, H)
        # the normaliser is the memory of a value that is always 1
        query, key, both = (chunked(x, chunk) for x in (query, key, F.pad(value, (0, 1), value=1.0)))
        log_forget, input_gate, row = (chunked(x, chunk) for x in (log_forget, input_gate, highest))  # (B, N, H, c)
        end = row[..., -1:]  # (B, N, H, 1), m after each chunk
        begin = torch.cat((start[:, None, :, None], end[:, :-1]), 1)  # and before
        total = log_forget.cumsum(-1)
        ahead = torch.ones(chunk, chunk, dtype=torch.bool, device=value.device).triu(1)
        exponent = total[..., :, None] - total[..., None, :] + input_gate[..., None, :] - row[..., None]
        weights = exponent.masked_fill(ahead, float("-inf")).exp()  # (B, N, H, c, c)
        read = (query @ key.transpose(-1, -2) * weights) @ both
        left = (total[..., -1:] - total + input_gate - end).exp()[..., None]  # each token's share at the end
        local = key.transpose(-1, -2) @ (both * left)  # (B, N, H, K, V + 1)
        fade = (total[..., -1:] + begin - end).exp()[..., None]  # (B, N, H, 1, 1)
        known = None if state is None else torch.cat((state.memory, state.normalizer[..., None]), -1)
        before, last = carry(local, fade, known)
        if before is not None:
            read = read + (query @ before) * (total + begin - row).exp()[..., None]
        read, weight = read.split((width, 1), -1)
        mixed = read / (torch.maximum(weight.abs(), (-row).exp()[..., None]) + EPS)
    return joined(mixed, time).to(value.dtype), MLSTMState(last[..., :-1], last[..., -1], highest[:, -1])
