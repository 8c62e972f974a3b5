"""Checks of constructor arguments. A ValueError starts with the argument, so that the config key can be named."""


def check_sizes(**sizes: float) -> None:
    """Raises ValueError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size} is below 1")


def hidden_width(hidden: int | None, default: float) -> int:
    """The inner width: `hidden` where it is given, else the rounded default; raises ValueError below 1."""
    hidden = round(default) if hidden is None else hidden
    check_sizes(hidden=hidden)
    return hidden


def head_width(dim: int, heads: int, name: str = "dim") -> int:
    """dim / heads; raises ValueError unless it is a whole number."""
    if heads < 1 or dim % heads:
        raise ValueError(f"heads: {heads} heads must divide {name} {dim}")
    return dim // heads


def even_head_width(dim: int, heads: int) -> int:
    """dim / heads; raises ValueError unless it is an even number."""
    if heads < 1 or dim % (2 * heads):
        raise ValueError(f"heads: {heads} heads must divide dim {dim} into even parts")
    return dim // heads
