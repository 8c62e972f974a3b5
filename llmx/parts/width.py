"""The inner width of a feed-forward or mixer."""


def hidden_width(hidden: int | None, default: float) -> int:
    """Returns `hidden` where it is given, else the rounded default. Raises ValueError for a width below 1."""
    width = round(default) if hidden is None else hidden
    if width < 1:
        raise ValueError(f"hidden: {width} is below 1")
    return width
