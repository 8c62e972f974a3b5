"""Checks of constructor arguments. A ValueError starts with the argument, so that the config key can be named."""


def check_sizes(**sizes: float) -> None:
    """Raises ValueError for the first size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {size} is below 1")


def check_positive(**numbers: float) -> None:
    """Raises ValueError for the first number that is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name}: {number} is not above 0")


def hidden_width(hidden: int | None, default: float) -> int:
    """The inner width: `hidden` where it is given, else the rounded default; raises ValueError below 1."""
    hidden = round(default) if hidden is None else hidden
    check_sizes(hidden=hidden)
    return hidden


def head_width(dim: int, heads: int, name: str = "dim", even: bool = False) -> int:
    """dim / heads; raises ValueError unless it is a whole number, and an even one if asked for."""
    if heads < 1 or dim % (2 * heads if even else heads):
        raise ValueError(f"heads: {heads} heads must divide {name} {dim}{' into even parts' if even else ''}")
    return dim // heads
