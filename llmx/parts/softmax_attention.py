"""The base of the softmax attention mixers: grouped heads, their projections, the key/value cache and all three forms.

    query, key, value = project(x)        (B, T, H, K), (B, T, G, K), (B, T, G, V)
    forward:         y = output(mix(query, key, value))
    step, prefill:   y = output(attend(query, key, value, cache))

A mixer overrides the hooks that its paper changes. `project` places norms and positions. `mix` and `attend` are two
independent texts of one function: the parallel form, and the same over the cache. `output` holds gates. The cache is
preallocated, 2 G K numbers a slot, and keeps keys as `project` returns them: rotated, where the mixer rotates.
"""

from abc import abstractmethod

from torch import Tensor, nn

from llmx.parts.attention import KeyValues, attend_cache, causal_attention, empty_cache
from llmx.parts.checks import head_width
from llmx.parts.init import normal_, residual_std
from llmx.parts.rotary import rotate, shared_table
from llmx.protocol import Context, Hidden, Site, StatefulMixer

Heads = tuple[Tensor, Tensor, Tensor]  # query (B, T, H, K), key (B, T, G, K), value (B, T, G, V)


class SoftmaxAttention(StatefulMixer[KeyValues]):
    """(B, T, D) -> (B, T, D). By default: rotary positions, and scores over the whole past.

    A mixer's `__init__` states its own arguments. It calls this one first, then makes its own modules, then calls
    `add_output`. This order fixes the initial draws, and the order of parameters in a checkpoint's optimizer state.
    `heads` must divide `dim`, into even parts if there is a rotary base. `kv_heads` must divide `heads`; None makes as
    many. `rotary_base` is None for a mixer whose `project` does not read it. `bias` holds for all projections, and
    `dropout` for attention weights.
    """

    rotary_base: float

    @abstractmethod
    def __init__(
        self,
        site: Site,
        heads: int,
        kv_heads: int | None = None,
        rotary_base: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        self.head_dim = head_width(site.dim, heads, even=rotary_base is not None)
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads: {kv_heads} must divide heads {heads}")
        if rotary_base is not None:
            self.rotary_base = rotary_base
        self.heads = heads
        self.kv_heads = kv_heads
        self.dropout = dropout
        self.qkv = nn.Linear(site.dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)

    def add_output(self, site: Site, *own: nn.Linear, std: float | None = None) -> None:
        """Makes W_o, then draws all weights: qkv, the mixer's own matrices, W_o with 0.02 / sqrt(2 depth) or `std`."""
        self.out = nn.Linear(site.dim, site.dim, bias=self.qkv.bias is not None)
        for linear in (self.qkv, *own):
            normal_(linear)
        normal_(self.out, residual_std(site.depth) if std is None else std)

    def project(self, x: Tensor, context: Context) -> Heads:
        """Rotated query and key, and value, of x (B, T, D); x and heads have no T in `step`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        # split, not slices: its gradient is one concatenation, that of slices a sum of padded tensors
        both, value = heads.split((self.heads + self.kv_heads, self.kv_heads), -2)
        query, key = rotate(both, self.rotary_table(context, x)).split((self.heads, self.kv_heads), -2)
        return query, key, value

    def mix(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        """The parallel form: query (B, H, T, K), key (B, G, T, K), value (B, G, T, V) -> (B, H, T, V)"""
        return causal_attention(query, key, value, self.active_dropout)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValues, context: Context
    ) -> tuple[Tensor, KeyValues]:
        """`Heads` of the T tokens of a prefill, or of the one of a step, -> (B, T, H V) and the cache with them."""
        return attend_cache(query, key, value, cache, context)

    def output(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What the heads found, (..., H V), and the input x (..., D) -> (..., D)"""
        return self.out(mixed)

    def forward(self, x: Hidden, context: Context) -> Hidden:
        query, key, value = (heads.transpose(1, 2) for heads in self.project(x, context))
        mixed = self.mix(query, key, value, context)  # (B, H, T, V)
        return self.output(mixed.transpose(1, 2).flatten(2), x)

    def init_state(self, batch_size: int, max_length: int) -> KeyValues:
        return empty_cache(self.out.weight, batch_size, self.kv_heads, max_length, self.head_dim)

    def step(self, x: Tensor, state: KeyValues, context: Context) -> tuple[Tensor, KeyValues]:
        query, key, value = (heads[:, None] for heads in self.project(x, context))
        mixed, state = self.attend(query, key, value, state, context)
        return self.output(mixed[:, 0], x), state

    def prefill(self, x: Hidden, state: KeyValues, context: Context) -> tuple[Hidden, KeyValues]:
        mixed, state = self.attend(*self.project(x, context), state, context)
        return self.output(mixed, x), state

    def split_heads(self, x: Tensor) -> Heads:
        """Query, key and value without positions, for a mixer's own `project`."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), -2)
        return query, key, value

    def rotary_table(self, context: Context, x: Tensor) -> Tensor:
        """Cosines and sines for whole heads, one table for all layers."""
        return shared_table(context, self.head_dim, self.rotary_base, x.dtype)

    @property
    def active_dropout(self) -> float:
        return self.dropout if self.training else 0.0
