"""An empty feed-forward slot: it adds 0 to the stream, to study a mixer alone."""

from llmx.protocol import Context, Hidden, Pointwise, Site


class NoFeedForward(Pointwise):
    """(B, T, D) -> zeros (B, T, D)."""

    def __init__(self, site: Site):
        super().__init__()

    def forward(self, x: Hidden, context: Context) -> Hidden:
        return 0 * x
