"""A corpus and a network whose fit takes a second."""

from typing import Any

TEXT = "".join(f"{i * i % 97:02d} the quick brown fox, {i % 13} lazy dogs;\n" for i in range(120))  # 4 kB


def network(depth: int) -> dict[str, Any]:
    """The config of a Llama of dim 8."""
    mixer = {"class_path": "Attention", "init_args": {"heads": 2}}
    feed_forward = {"class_path": "SwiGLU", "init_args": {"hidden": 8}}
    block = {"class_path": "PreNormBlock", "init_args": {"mixer": mixer, "feed_forward": feed_forward}}
    return {"class_path": "Decoder", "init_args": {"dim": 8, "depth": depth, "block": block}}
