"""The normalized Transformer: the paper's equations written out, and lengths that stay 1 while it trains."""

import math
import string
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from llmx import LanguageModel
from llmx.blocks.ngpt import NGPTBlock
from llmx.data.datamodule import TextDataModule
from llmx.feedforward.ngpt import NGPTSwiGLU
from llmx.mixers.ngpt import NGPTAttention
from llmx.networks.decoder import Decoder
from llmx.networks.embeddings import UnitEmbedding
from llmx.networks.heads import UnitHead
from llmx.parts.norm import LearnedScale, NoNorm, unit_norm
from llmx.protocol import Site
from llmx.training.trainer import Trainer

VOCAB, DIM, HEADS, HIDDEN, DEPTH = 11, 24, 3, 17, 2
HEAD_DIM = DIM // HEADS


def factory(depth: int = DEPTH) -> partial:
    return partial(
        Decoder,
        dim=DIM,
        depth=depth,
        embedding=UnitEmbedding,
        block=partial(
            NGPTBlock,
            mixer=partial(NGPTAttention, heads=HEADS),
            feed_forward=partial(NGPTSwiGLU, hidden=HIDDEN),
        ),
        norm=NoNorm,
        head=UnitHead,
    )


def built() -> Decoder:
    torch.manual_seed(0)
    return factory()(VOCAB).double()


def moved(network: Decoder) -> Decoder:
    """Weights and scales far from where they start, some rates below 0, the matrices' vectors of length 1 again."""
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    network.after_optimizer_step()
    return network


def vectors(network: Decoder) -> dict[str, Tensor]:
    """The vectors in the embedding space that each matrix is made of, (..., D), by the matrix's name."""
    writing = ("out.weight", "down.weight")
    matrices = {name: weight for name, weight in network.named_parameters() if weight.ndim == 2}
    assert len(matrices) == 2 + 4 * DEPTH
    found = {name: weight.T if name.endswith(writing) else weight for name, weight in matrices.items()}
    assert all(weight.shape[1] == DIM for weight in found.values())
    return found


def assert_of_length_1(network: Decoder, tolerance: float) -> None:
    for name, weight in vectors(network).items():
        lengths = weight.detach().norm(dim=1)
        assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def reference(tokens: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Table 1 of the paper for one sequence, token by token and head by head: (T,) -> logits (T, V).

    Scales are `weights` times their start over what is stored at first.
    """

    def unit(x: Tensor) -> Tensor:
        return x / (x * x).sum().sqrt()

    def rotary(x: Tensor, position: int) -> Tensor:
        pairs = torch.view_as_complex(torch.stack(x.split(HEAD_DIM // 2), -1))
        angles = position * 10000.0 ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))
        turned = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag))

    root = math.sqrt(DIM)
    stream = [weights["embedding.table.weight"][token] for token in tokens]
    for layer in range(DEPTH):
        block = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        query_matrix, key_matrix, value_matrix = block["mixer.qkv.weight"].split(DIM)
        gate_matrix, up_matrix = block["feed_forward.gate_up.weight"].split(HIDDEN)
        s_qk = block["mixer.scale.weight"] * root  # starts at 1, stored as 1 / sqrt(D)
        s_v, s_u = block["feed_forward.gate_scale.weight"] * root, block["feed_forward.up_scale.weight"]
        rate_a = (block["mixer_rate.weight"] * 0.05 * root).abs()
        rate_m = (block["feed_forward_rate.weight"] * 0.05 * root).abs()
        after = []
        for t, h in enumerate(stream):
            mixed = []
            for head in range(HEADS):
                rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                query = unit(rotary(query_matrix[rows] @ h, t)) * s_qk[rows]
                keys = [unit(rotary(key_matrix[rows] @ past, s)) * s_qk[rows] for s, past in enumerate(stream[: t + 1])]
                shares = torch.stack([math.sqrt(HEAD_DIM) * (query @ key) for key in keys]).softmax(0)
                mixed.append(sum(p * (value_matrix[rows] @ past) for p, past in zip(shares, stream, strict=False)))
            h_a = unit(block["mixer.out.weight"] @ torch.cat(mixed))
            h = unit(h + rate_a * (h_a - h))
            u, v = up_matrix @ h * s_u, gate_matrix @ h * s_v
            h_m = unit(block["feed_forward.down.weight"] @ (u * v * v.sigmoid()))
            after.append(unit(h + rate_m * (h_m - h)))
        stream = after
    s_z = weights["head.scale.weight"] * root
    return torch.stack([s_z * (weights["head.linear.weight"] @ h) for h in stream])


def test_the_network_is_the_paper_written_out():
    network = moved(built())
    tokens = torch.randint(VOCAB, (2, 9))
    expected = torch.stack([reference(row, dict(network.named_parameters())) for row in tokens])
    assert_close(network(tokens), expected, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_paper_written_out():
    network = moved(built())
    tokens = torch.randint(VOCAB, (6,))
    parameters = dict(network.named_parameters())
    weights = torch.randn(6, VOCAB, dtype=torch.float64)
    ours = torch.autograd.grad((network(tokens[None])[0] * weights).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((reference(tokens, parameters) * weights).sum(), list(parameters.values()))
    for name, one, two in zip(parameters, ours, theirs, strict=True):
        assert_close(one, two, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_stepping_is_the_paper_written_out():
    network = moved(built())
    tokens = torch.randint(VOCAB, (7,))
    state, logits = network.init_state(1, 7), []
    with torch.no_grad():
        for token in tokens:
            output, state = network.step(token[None], state)
            logits.append(output[0])
        assert_close(torch.stack(logits), reference(tokens, dict(network.named_parameters())), rtol=1e-10, atol=1e-10)


def test_every_matrix_starts_with_vectors_of_length_1_along_the_embedding_space():
    assert_of_length_1(factory()(VOCAB), 1e-6)


def test_renormalising_takes_the_columns_of_what_writes_to_the_stream():
    network = moved(built())
    assert_of_length_1(network, 1e-12)
    for block in network.layers:  # a square matrix fits either way, and only one way is right
        assert (block.mixer.out.weight.norm(dim=1) - 1).abs().max() > 0.1


def test_renormalising_keeps_directions_and_does_nothing_twice():
    network = built()
    before = {name: weight.detach().clone() for name, weight in vectors(network).items()}
    with torch.no_grad():
        for weight in vectors(network).values():
            weight.mul_(torch.rand(len(weight), 1, dtype=torch.float64) + 0.5)
    network.after_optimizer_step()
    network.after_optimizer_step()
    for name, weight in vectors(network).items():
        assert_close(weight.detach(), before[name], rtol=0, atol=1e-6)  # made in float32


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_the_stream_has_length_1_after_the_embedding_and_every_block(dtype, tolerance):
    network = moved(built()).to(dtype)
    streams = []
    for module in (network.embedding, *network.layers):
        module.register_forward_hook(lambda module, args, output: streams.append(output.detach()))
    hidden, _ = network.hidden(torch.randint(VOCAB, (3, 8)))
    assert len(streams) == 1 + DEPTH
    for x in (*streams, hidden):
        assert x.shape == (3, 8, DIM)
        assert_close(x.double().norm(dim=-1), torch.ones(3, 8, dtype=torch.float64), rtol=0, atol=tolerance)


def test_scales_start_where_the_paper_has_them_and_are_stored_as_it_says():
    network = factory(depth=1)(VOCAB)
    block = network.layers[0]
    small = DIM**-0.5
    for scale, start, stored in [
        (block.mixer_rate, 0.05, small),
        (block.feed_forward_rate, 0.05, small),
        (block.mixer.scale, 1.0, small),
        (block.feed_forward.up_scale, 1.0, 1.0),
        (block.feed_forward.gate_scale, math.sqrt(DIM), 1.0),
        (network.head.scale, 1.0, small),
    ]:
        assert_close(scale().detach(), torch.full_like(scale.weight, start).detach())
        assert_close(scale.weight.detach(), torch.full_like(scale.weight, stored).detach())
    assert sum(isinstance(module, LearnedScale) for module in network.modules()) == 6


def test_a_first_step_moves_the_stream_by_the_rate():
    torch.manual_seed(0)
    network = factory(depth=1)(VOCAB).double()
    block = network.layers[0]
    x = network.embedding(torch.randint(VOCAB, (50, 1)), torch.zeros(1, 1))
    turned_to = unit_norm(torch.randn_like(x))
    y = block.connect(x, lambda h: 7 * turned_to, lambda h: h)  # the branch's own length does not count
    assert_close(y, unit_norm(0.95 * x + 0.05 * turned_to))


def test_lengths_are_1_after_real_optimizer_steps_and_the_loss_falls(laboratory):
    laboratory.write_corpus(string.ascii_lowercase * 60)
    data = TextDataModule(corpus="corpus.txt", window=8, batch_size=8)
    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    torch.manual_seed(0)
    model = LanguageModel(factory(), data.tokenizer, window=8, optimizer=optimizer, audit="off")
    start = {name: weight.detach().clone() for name, weight in vectors(model.network).items()}
    trainer = Trainer(
        max_steps=20,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=2,
    )
    trainer.fit(model, datamodule=data)
    assert_of_length_1(model.network, 1e-6)
    for name, weight in vectors(model.network).items():
        assert not torch.allclose(weight, start[name], atol=0.01), name
    assert trainer.callback_metrics["train/loss"] < math.log(26) - 0.5


def test_equal_weights_are_renormalised_to_equal_weights_on_every_process():
    one, two = moved(built()).float(), built().float()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.mul_(3)
    two.load_state_dict(one.state_dict())
    one.after_optimizer_step()
    torch.manual_seed(99)  # no draw of any generator goes in
    two.after_optimizer_step()
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_tied_head_shares_the_embedding_and_stays_of_length_1():
    network = factory()(VOCAB, tied=True)
    assert network.head.linear.weight is network.embedding.weight
    with torch.no_grad():
        network.embedding.weight.mul_(2)
    network.after_optimizer_step()
    lengths = network.embedding.weight.detach().norm(dim=1)
    assert_close(lengths, torch.ones_like(lengths))


def test_a_vector_of_zeros_stays_and_has_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    unit_norm(x).sum().backward()
    assert not unit_norm(x).any()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: NGPTAttention(Site(dim=24), heads=5), "heads"),
        (lambda: NGPTAttention(Site(dim=24), heads=0), "heads"),
        (lambda: NGPTSwiGLU(Site(dim=24), hidden=0), "hidden"),
        (lambda: NGPTBlock(Site(dim=32), NGPTAttention, NGPTSwiGLU, rate=0.0), "rate"),
    ],
)
def test_a_bad_argument_is_named(make, key):
    with pytest.raises(ValueError, match=f"^{key}: "):
        make()
