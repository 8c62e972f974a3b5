"""The parallel block against GPT-J and Cohere of transformers, on the same random weights.

Both turn neighbouring channels by one angle, ours channels i and i + K/2: query and key are permuted.
"""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx.blocks.parallel import ParallelBlock
from llmx.feedforward.mlp import MLP
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.networks.heads import LinearHead
from llmx.parts.norm import LayerNorm
from llmx.protocol import Context, Mixer, Site, Stateless

gptj = pytest.importorskip("transformers.models.gptj")
cohere = pytest.importorskip("transformers.models.cohere")

VOCAB = 17
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 rounding
SHAPES = [  # dim, heads, hidden, depth, batch, time
    (32, 8, 24, 2, 2, 7),
    (48, 4, 31, 3, 1, 13),
    (12, 3, 5, 1, 3, 1),
]


def randomised(network: Decoder) -> Decoder:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.25)
    return network


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows i and i + K/2 of each head become its rows 2 i and 2 i + 1."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def gptj_pair(dim: int, heads: int, hidden: int, depth: int) -> tuple[Decoder, nn.Module]:
    torch.manual_seed(0)
    block = partial(
        ParallelBlock,
        mixer=partial(Attention, heads=heads),
        feed_forward=partial(MLP, hidden=hidden, activation="gelu_tanh", bias=True),
        norm=LayerNorm,
    )
    head = partial(LinearHead, bias=True)
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=LayerNorm, head=head))
    theirs = gptj.GPTJForCausalLM(
        gptj.GPTJConfig(
            vocab_size=VOCAB,
            n_positions=16,
            n_embd=dim,
            n_layer=depth,
            n_head=heads,
            rotary_dim=dim // heads,
            n_inner=hidden,
            attn_implementation="eager",
        )
    ).eval()
    theirs.load_state_dict(as_gptj(ours, {name: tensor.detach() for name, tensor in ours.named_parameters()}))
    return ours, theirs


def as_gptj(network: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters, or their gradients, under the names that transformers gives them."""
    named = {
        "transformer.wte.weight": tensors["embedding.table.weight"],
        "transformer.ln_f.weight": tensors["norm.weight"],
        "transformer.ln_f.bias": tensors["norm.bias"],
        "lm_head.weight": tensors["head.linear.weight"],
        "lm_head.bias": tensors["head.linear.bias"],
    }
    for layer, block in enumerate(network.layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        query, key, value = tensors[f"{ours}.mixer.qkv.weight"].chunk(3)
        named |= {
            f"{theirs}.attn.q_proj.weight": interleaved(query, block.mixer.head_dim),
            f"{theirs}.attn.k_proj.weight": interleaved(key, block.mixer.head_dim),
            f"{theirs}.attn.v_proj.weight": value,
            f"{theirs}.attn.out_proj.weight": tensors[f"{ours}.mixer.out.weight"],
        }
        for kind in ("weight", "bias"):
            named |= {
                f"{theirs}.ln_1.{kind}": tensors[f"{ours}.norm.{kind}"],
                f"{theirs}.mlp.fc_in.{kind}": tensors[f"{ours}.feed_forward.up.{kind}"],
                f"{theirs}.mlp.fc_out.{kind}": tensors[f"{ours}.feed_forward.down.{kind}"],
            }
    return named


def cohere_pair(dim: int, heads: int, kv_heads: int, hidden: int, depth: int) -> tuple[Decoder, nn.Module]:
    torch.manual_seed(0)
    norm = partial(LayerNorm, bias=False)
    block = partial(
        ParallelBlock,
        mixer=partial(Attention, heads=heads, kv_heads=kv_heads, rotary_base=500.0),
        feed_forward=partial(SwiGLU, hidden=hidden),
        norm=norm,
    )
    ours = randomised(Decoder(VOCAB, block, dim=dim, depth=depth, norm=norm))
    theirs = cohere.CohereForCausalLM(
        cohere.CohereConfig(
            vocab_size=VOCAB,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            logit_scale=1.0,
            layer_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
            tie_word_embeddings=False,
            pad_token_id=0,
        )
    ).eval()
    theirs.load_state_dict(as_cohere(ours, {name: tensor.detach() for name, tensor in ours.named_parameters()}))
    return ours, theirs


def as_cohere(network: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "model.embed_tokens.weight": tensors["embedding.table.weight"],
        "model.norm.weight": tensors["norm.weight"],
        "lm_head.weight": tensors["head.linear.weight"],
    }
    for layer, block in enumerate(network.layers):
        ours, theirs, mixer = f"blocks.{layer}", f"model.layers.{layer}", block.mixer
        widths = [count * mixer.head_dim for count in (mixer.heads, mixer.kv_heads, mixer.kv_heads)]
        query, key, value = tensors[f"{ours}.mixer.qkv.weight"].split(widths)
        gate, up = tensors[f"{ours}.feed_forward.gate_up.weight"].chunk(2)
        named |= {
            f"{theirs}.self_attn.q_proj.weight": interleaved(query, mixer.head_dim),
            f"{theirs}.self_attn.k_proj.weight": interleaved(key, mixer.head_dim),
            f"{theirs}.self_attn.v_proj.weight": value,
            f"{theirs}.self_attn.o_proj.weight": tensors[f"{ours}.mixer.out.weight"],
            f"{theirs}.mlp.gate_proj.weight": gate,
            f"{theirs}.mlp.up_proj.weight": up,
            f"{theirs}.mlp.down_proj.weight": tensors[f"{ours}.feed_forward.down.weight"],
            f"{theirs}.input_layernorm.weight": tensors[f"{ours}.norm.weight"],
        }
    return named


def assert_same(ours: Decoder, theirs: nn.Module, rename, batch: int, time: int, skip: tuple[str, ...] = ()) -> None:
    text = torch.randint(1, VOCAB, (batch, time + 1))
    tokens, targets = text[:, :-1], text[:, 1:]
    expected = theirs(input_ids=tokens).logits
    assert_close(ours(tokens), expected, **CLOSE)
    state, logits = ours.init_state(batch, time), []
    for t in range(time):
        one, state = ours.step(tokens[:, t], state)
        logits.append(one)
    assert_close(torch.stack(logits, 1), expected, **CLOSE)

    ours.losses(tokens, targets)[0].mean().backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    gradients = rename(ours, {name: parameter.grad for name, parameter in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        assert_close(gradients[name], parameter.grad, **CLOSE, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize(("dim", "heads", "hidden", "depth", "batch", "time"), SHAPES)
def test_logits_steps_and_gradients_are_those_of_gptj(dim, heads, hidden, depth, batch, time):
    assert_same(*gptj_pair(dim, heads, hidden, depth), as_gptj, batch, time)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_steps_and_gradients_are_those_of_cohere(kv_heads):
    assert_same(*cohere_pair(32, 4, kv_heads, 24, 2), as_cohere, 2, 9)


class Constant(Mixer):
    """Writes 1 to the stream, whatever it reads."""

    def __init__(self, site: Site):
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return torch.ones_like(x)


class Recording(Stateless):
    """Remembers what it read."""

    def __init__(self, site: Site):
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        self.read = x
        return 0 * x


def test_the_feed_forward_reads_the_stream_before_the_mixer_has_written():
    block = ParallelBlock(Site(dim=6), Constant, Recording)
    x = torch.randn(2, 3, 6)
    context = Context(torch.zeros(2, 3, dtype=torch.int64), torch.arange(3)[None], x)
    assert_close(block(x, context), x + 1)
    assert_close(block.feed_forward.read, block.norm(x))
