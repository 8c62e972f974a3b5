"""What a network is made of, a row a layer."""

from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from llmx.protocol import Network, Stateful


def parameters(module: nn.Module) -> int:
    """Numbers to train, shared ones counted once."""
    return sum(p.numel() for p in module.parameters())


def state_bytes(component: nn.Module, length: int) -> int | None:
    """Bytes that one sequence of `length` tokens keeps in the state; None where there is no recurrent form."""
    if not isinstance(component, Stateful):
        return None
    leaves = tree_leaves(component.init_state(1, length))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def composition_table(network: Network, window: int) -> Table:
    """Layer, mixer, feed-forward, parameters, and bytes of state a sequence of `window` tokens."""
    table = Table(title=f"{type(network).__name__}, {parameters(network):,} parameters", title_justify="left")
    for heading in ("layer", "mixer", "feed-forward"):
        table.add_column(heading)
    for heading in ("parameters", "state bytes"):
        table.add_column(heading, justify="right")
    for number, block in enumerate(network.layers):
        sizes = [state_bytes(part, window) for part in (block.mixer, block.feed_forward)]
        state = "recomputes" if None in sizes else f"{sum(size or 0 for size in sizes):,}"
        table.add_row(
            str(number),
            type(block.mixer).__name__,
            type(block.feed_forward).__name__,
            f"{parameters(block):,}",
            state,
        )
    rest = parameters(network) - sum(parameters(block) for block in network.layers)
    table.add_row("", "embedding, head and the rest", "", f"{rest:,}", "")
    return table
