"""A network of two small layers."""

from functools import partial
from typing import Any

from llmx.blocks.prenorm import PreNormBlock
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder

VOCAB = 5
TWO_HEADS = partial(Attention, heads=2)


def factory(mixer: Any = TWO_HEADS, **arguments: Any) -> Any:
    block = partial(PreNormBlock, mixer=mixer, feed_forward=partial(SwiGLU, hidden=8))
    return partial(Decoder, block=block, dim=8, depth=2, **arguments)


def tiny(*arguments: Any, **named: Any) -> Decoder:
    return factory(*arguments, **named)(VOCAB)
