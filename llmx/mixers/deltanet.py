"""DeltaNet (arXiv 2406.06484): linear attention that erases what a key already holds before it writes.

    [q; k; v]_t = silu(conv(W x))_t,    q, k of length 1 in each head, q / sqrt(K);    beta_t = B sigmoid(W_b x_t)  (H,)
    S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T         (K, K) a head, K = D / H
    y_t = W_o norm(S_t^T q_t)                                       norm: RMSNorm over the K channels of a head

Each token takes one step of gradient descent on |S^T k_t - v_t|^2 / 2 with rate beta_t. With B = 2 the eigenvalue of
the transition along k_t lies between -1 and 1 (arXiv 2411.12537): one head then tracks the parity of a bit string,
which eigenvalues from 0 up cannot do at every length. Time O(T (c + K) D) in chunks of c = 32, see llmx/parts/delta.py.
The state is S and the last 3 inputs of the convolution, K D + 9 D numbers. Nothing fades. The traps: a key longer than
1 makes the transition grow, and the memory without bound. Keys are normalised after convolution and SiLU.
"""

from torch import Tensor, nn

from llmx.parts.checks import head_width
from llmx.parts.delta import check_rate, delta_rule, delta_step, unit_heads
from llmx.parts.init import normal_, residual_std
from llmx.parts.norm import RMSNorm
from llmx.parts.precision import at_least_float32, exact_zeros
from llmx.parts.short_convolution import ShortConvolution
from llmx.parts.states import ConvolvedState
from llmx.protocol import Context, Hidden, PrefillMixer, Site


class DeltaNet(PrefillMixer[ConvolvedState]):
    """(B, T, D) -> (B, T, D).

    Args:
        heads: H; must divide `dim`.
        convolution: tokens that the convolution sees, the current one among them.
        beta_max: B, above 0 and up to 2.
    """

    def __init__(self, site: Site, heads: int = 4, convolution: int = 4, beta_max: float = 1.0):
        super().__init__()
        check_rate(beta_max)
        self.heads = heads
        self.head_dim = head_width(site.dim, heads)
        self.beta_max = beta_max
        self.widths = (3 * site.dim, heads)  # q, k, v; beta
        self.project = nn.Linear(site.dim, sum(self.widths), bias=False)
        self.convolution = ShortConvolution(3 * site.dim, convolution)
        self.norm = RMSNorm(self.head_dim)
        self.out = nn.Linear(site.dim, site.dim, bias=False)
        normal_(self.project)
        normal_(self.out, residual_std(site.depth))

    def init_state(self, batch_size: int, max_length: int) -> ConvolvedState:
        memory = exact_zeros(self.out.weight, batch_size, self.heads, self.head_dim, self.head_dim)
        return ConvolvedState(self.convolution.init_state(batch_size), memory)

    def step(self, x: Tensor, state: ConvolvedState, context: Context) -> tuple[Tensor, ConvolvedState]:
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.step(u, state.convolution)
        mixed, memory = delta_step(*self._heads(u, rate), None, state.memory)
        return self.out(self.norm(mixed).flatten(-2)), ConvolvedState(convolution, memory)

    def prefill(self, x: Hidden, state: ConvolvedState | None, context: Context) -> tuple[Hidden, ConvolvedState]:
        convolution, memory = state or (None, None)
        u, rate = self.project(x).split(self.widths, -1)
        u, convolution = self.convolution.prefill(u, convolution)
        mixed, memory = delta_rule(*self._heads(u, rate), None, memory)
        return self.out(self.norm(mixed).flatten(-2)), ConvolvedState(convolution, memory)

    def _heads(self, u: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value (B, T, H, K), beta (B, T, H), without T in `step`."""
        beta = self.beta_max * at_least_float32(rate).sigmoid()
        return *unit_heads(u, self.heads, self.head_dim, self.heads), beta
