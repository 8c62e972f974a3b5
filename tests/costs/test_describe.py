"""What a network is made of and what it costs, without running it: the module, and the verb of the command line."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from llmx.blocks.cycle import Cycle
from llmx.blocks.prenorm import PreNormBlock
from llmx.cli import main
from llmx.config.base_files import read_config
from llmx.config.factories import build
from llmx.costs.describe import describe
from llmx.costs.flops import forward_flops
from llmx.feedforward.none import NoFeedForward
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.networks.embeddings import LearnedPositionEmbedding
from llmx.networks.founding import FoundingNetwork
from llmx.parts.parameter_count import count_parameters
from llmx.protocol import Mixer, Stack

CHECKOUT = Path(__file__).parents[2]
CONFIGS = CHECKOUT / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if "network" in (read_config(path).get("model") or {}) and path.parent.name != "ingredients"  # parts of one
)
SCALE = {"llama3_1b": 1_235_814_400, "llama2_7b": 6_738_415_616, "llama2_70b": 68_976_648_192}
V, D, L, T = 65, 32, 3, 20

BLOCK = partial(PreNormBlock, mixer=partial(Attention, heads=4), feed_forward=partial(SwiGLU, hidden=40))
LLAMA = partial(Decoder, V, BLOCK, dim=D, depth=L)


class Averaging(Mixer):
    """Forward only."""

    def __init__(self, site):
        super().__init__()
        self.out = nn.Linear(site.dim, site.dim)

    def forward(self, x, context):
        return self.out(x.cumsum(1) / (context.positions[..., None] + 1))


class Asking(Averaging):
    """Asks for a number in `forward`, which the meta device has not."""

    def forward(self, x, context):
        return super().forward(x, context) if x.sum().item() else x


class AskingEarly(Averaging):
    """Asks for a number in its constructor."""

    def __init__(self, site):
        super().__init__(site)
        self.scale = torch.linspace(0, 1, 3).sum().item()


class Twice(Stack):
    """Every block runs twice, and the stack has a parameter of its own."""

    def __init__(self, site):
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(7))

    def order(self):
        return [*range(self.depth), *range(self.depth)]

    def forward(self, x, runs):
        for run in runs:
            x = run(x)
        return x * self.gain.mean()


def assert_sums(description):
    assert sum(group.parameters for group in description.groups.values()) == description.parameters
    assert all(group.parameters >= 0 for group in description.groups.values())
    if description.flops_per_token is not None:
        counted = [group.flops_per_token for group in description.groups.values()]
        assert sum(counted) == pytest.approx(description.flops_per_token)
        assert min(counted, default=0) >= 0


def test_layers_and_groups_have_the_parameters_of_the_network():
    network = LLAMA()
    description = describe(network, T)
    assert_sums(description)
    block = 4 * D * D + 3 * D * 40 + 2 * D
    assert [layer.parameters for layer in description.layers] == [block] * L
    assert {name: group.parameters for name, group in description.groups.items()} == {
        "embedding": V * D,
        "mixers": L * 4 * D * D,
        "feed-forward": L * 3 * D * 40,
        "norms": (2 * L + 1) * D,
        "head": V * D,
    }
    assert description.parameters == count_parameters(network) == L * block + 2 * V * D + D


def test_the_flops_are_those_of_the_formula_with_the_whole_square_of_attention():
    description = describe(LLAMA(), T)
    matrices = L * (4 * D * D + 3 * D * 40) + V * D
    assert description.flops_per_token == 2 * matrices + 4 * L * D * T
    assert description.training_flops_per_token == 6 * matrices + 12 * L * D * T
    assert description.groups["mixers"].flops_per_token == L * (8 * D * D + 4 * D * T)
    assert [layer.flops_per_token for layer in description.layers] == [8 * D * D + 4 * D * T + 6 * D * 40] * L


def test_grouped_heads_do_not_change_what_attention_costs():
    block = partial(PreNormBlock, mixer=partial(Attention, heads=4, kv_heads=1), feed_forward=NoFeedForward)
    description = describe(Decoder(V, block, dim=D, depth=1), T)
    assert description.groups["mixers"].flops_per_token == 2 * (2 * D * D + 2 * D * D // 4) + 4 * D * T


def test_attention_counts_the_same_by_its_numbers_on_the_cpu_where_the_fused_kernel_would_count_nothing():
    network = LLAMA()
    real = forward_flops(network, ["blocks.0", "blocks.0.mixer"], T)
    assert real.total == describe(network, T).flops_per_token * T
    assert real.flops["blocks.0.mixer"] == (8 * D * D + 4 * D * T) * T


def test_a_tied_head_is_counted_once_and_says_so():
    description = describe(LLAMA(tied=True), T)
    assert_sums(description)
    assert description.groups["head"].parameters == 0
    assert description.groups["head"].shared == V * D
    assert description.groups["head"].flops_per_token == 2 * V * D
    assert "head (tied to the embedding)" in text(description)


def test_the_state_is_that_of_the_whole_network():
    description = describe(LLAMA(), 100)
    assert [layer.state_bytes for layer in description.layers] == [2 * D * 100 * 4] * L
    assert description.state_bytes == L * 2 * D * 100 * 4 + 8  # and the position


def test_a_block_that_runs_twice_has_the_work_and_the_state_of_both_runs():
    once, twice = describe(LLAMA(), T), describe(LLAMA(stack=Twice), T)
    assert_sums(twice)
    assert [layer.runs for layer in twice.layers] == [2] * L
    for a, b in zip(once.layers, twice.layers, strict=True):
        assert b.parameters == a.parameters
        assert b.flops_per_token == 2 * a.flops_per_token
        assert b.state_bytes == 2 * a.state_bytes
    assert twice.state_bytes - 8 == 2 * (once.state_bytes - 8)
    assert twice.groups["other"].parameters == 7
    assert "other" not in once.groups
    assert "runs" in text(twice)
    assert "runs" not in text(once)


def test_a_cycle_shows_its_blocks_and_a_mixer_without_a_state_recomputes():
    other = partial(PreNormBlock, mixer=Averaging, feed_forward=NoFeedForward)
    description = describe(Decoder(V, partial(Cycle, blocks=[BLOCK, other]), dim=D, depth=4), T)
    assert_sums(description)
    assert [layer.mixer for layer in description.layers] == ["Attention", "Averaging"] * 2
    assert [layer.state_bytes is None for layer in description.layers] == [False, True] * 2
    assert description.state_bytes is None
    assert "recomputes" in text(description)


def test_a_network_that_asks_for_numbers_is_run_with_them_and_without_them_says_so():
    network = Decoder(V, partial(PreNormBlock, mixer=Asking, feed_forward=NoFeedForward), dim=D, depth=2)
    matrices = 2 * D * D + V * D
    assert describe(network, T).flops_per_token == 2 * matrices
    description = describe(network.to("meta"), T)
    assert description.flops_per_token is None
    assert_sums(description)
    assert "not counted" in text(description)
    assert json.loads(json.dumps(description.to_dict()))["flops_per_token"] is None


def test_describing_changes_neither_the_network_nor_the_random_state():
    network = LLAMA(dropout=0.5).train()
    before, seed = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    describe(network, T)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("length", [0, T + 1])
def test_a_length_that_cannot_be_is_refused(length):
    embedding = partial(LearnedPositionEmbedding, max_length=T)
    with pytest.raises(ValueError, match="length"):
        describe(LLAMA(embedding=embedding), length)


def text(description, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(description.render())
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_a_line_is_a_layer_at_80_columns_even_of_the_longest_numbers(width):
    with torch.device("meta"):
        block = partial(PreNormBlock, mixer=Attention, feed_forward=SwiGLU)
        network = Decoder(128256, block, dim=16384, depth=3)
    lines = text(describe(network, 131072), width).splitlines()
    assert max(map(len, lines)) <= width
    for number in range(3):
        assert len([line for line in lines if line.split()[:3] == [str(number), "Attention", "SwiGLU"]]) == 1
    shown = text(describe(FoundingNetwork(V), 32), width)
    assert shown.count("FoundingAttention  FoundingFeedForward") == 4


# ------------------------------------------------------------------------------------------------------------- the verb
@pytest.fixture
def corpus(laboratory):
    laboratory.write_corpus("".join(map(chr, range(33, 98))) * 20)
    return "corpus.txt"


def described(capsys, *arguments):
    """What `describe --format json` prints, which has to be JSON and nothing else."""
    assert main(["describe", *map(str, arguments), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_sums_to_the_network_that_it_builds(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / f"{name}.yaml"
    config = read_config(path)
    arguments = [] if "vocab_size" in config else ["--vocab_size", V]
    built = []
    monkeypatch.setattr("llmx.costs.from_config.build", lambda *given: built.append(given) or build(*given))
    found = described(capsys, "--config", path, *arguments)
    assert sum(group["parameters"] for group in found["groups"].values()) == found["parameters"]
    assert found["uncounted"] is None
    flops = [group["flops_per_token"] for group in found["groups"].values()]
    assert sum(flops) == pytest.approx(found["flops_per_token"])
    assert min(flops, default=0) >= 0
    if name.startswith("scale/"):
        assert found["parameters"] == SCALE[name.removeprefix("scale/")]
        assert found["length"] == config["data"]["window"]
        return
    assert found["length"] == config["data"]["window"]
    network = build(*built[0])  # with numbers
    assert found["parameters"] == count_parameters(network)
    assert len(found["layers"]) == len(network.layers)
    if network.stateful:
        leaves = torch.utils._pytree.tree_leaves(network.init_state(1, found["length"]))
        assert found["state_bytes"] == sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    else:
        assert found["state_bytes"] is None


def write(path, block, **top):
    network = {"class_path": "Decoder", "init_args": {"dim": 32, "depth": 2, "block": block}}
    Path(path).write_text(json.dumps({"model": {"network": network}, **top}))
    return path


def prenorm(mixer):
    feed_forward = {"class_path": "SwiGLU", "init_args": {"hidden": 40}}
    return {"class_path": "PreNormBlock", "init_args": {"mixer": mixer, "feed_forward": feed_forward}}


def test_the_vocabulary_is_that_of_the_corpus_or_declared_on_the_command_line_or_in_the_config(corpus, capsys):
    data = {"corpus": corpus, "window": 8}
    plain = write("plain.yaml", prenorm("Attention"), data=data)
    assert described(capsys, "--config", plain)["vocab_size"] == 65
    assert described(capsys, "--config", plain, "--vocab_size", 100)["vocab_size"] == 100
    declared = write("declared.yaml", prenorm("Attention"), vocab_size=70, data={**data, "corpus": "nowhere.txt"})
    assert described(capsys, "--config", declared)["vocab_size"] == 70
    assert described(capsys, "--config", declared, "--vocab_size", 80)["vocab_size"] == 80
    assert main(["describe", "--config", plain, "--data.corpus", "nowhere.txt"]) == 2
    assert "nowhere.txt" in capsys.readouterr().err


def test_length_is_the_window_if_not_given(corpus, capsys):
    path = write("plain.yaml", prenorm("Attention"), vocab_size=9, data={"window": 8})
    short, long = described(capsys, "--config", path), described(capsys, "--config", path, "--length", 24)
    assert (short["length"], long["length"]) == (8, 24)
    assert long["state_bytes"] - 8 == 3 * (short["state_bytes"] - 8)
    assert long["flops_per_token"] - short["flops_per_token"] == 2 * 4 * 32 * 16


def test_the_other_verbs_refuse_a_declared_vocabulary_of_another_size_than_the_tokenizers(corpus, capsys):
    declared = {"vocab_size": 70, "data": {"corpus": corpus, "window": 8}, "trainer": {"max_steps": 1}}
    path = write("declared.yaml", prenorm("Attention"), **declared)
    for verb in ("fit", "audit"):
        assert main([verb, "--config", path]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: vocab_size: 70 is declared, but the tokenizer of the data has 65")
        assert error.count("\n") == 1
    assert not Path("lightning_logs").exists()
    quiet = ["--trainer.enable_progress_bar", "false", "--model.network.block.mixer.heads", "2"]
    assert main(["fit", "--config", path, "--vocab_size", "65", *quiet]) == 0
    assert main(["validate", "--ckpt_path", "last", *quiet[:2]]) == 0
    assert main(["describe", "--ckpt_path", "last"]) == 0
    assert "vocabulary 65" in capsys.readouterr().out


def test_fit_begins_with_the_same_description(corpus, capsys):
    path = write("plain.yaml", prenorm("Attention"), data={"corpus": corpus, "window": 8}, trainer={"max_steps": 1})
    assert main(["describe", "--config", path]) == 0
    told = capsys.readouterr().out
    assert main(["fit", "--config", path, "--trainer.enable_progress_bar", "false"]) == 0
    assert told in capsys.readouterr().out


def test_entries_of_a_list_are_overridden_by_their_index(corpus, capsys):
    blocks = [prenorm("Attention"), prenorm({"class_path": "Attention", "init_args": {"heads": 3}})]
    path = write("cycle.yaml", {"class_path": "Cycle", "init_args": {"blocks": blocks}}, vocab_size=9)
    entry = "--model.network.block.blocks.1.mixer"
    assert described(capsys, "--config", path, f"{entry}.heads", 4)["layers"][1]["mixer"] == "Attention"
    for key in (entry, f"{entry}.class_path"):  # another component takes none of the arguments
        assert described(capsys, "--config", path, f"{key}=GRU")["layers"][1]["mixer"] == "GRU"
    long = "--model.network.init_args.block.init_args.blocks.1.init_args.mixer.init_args.heads=8"
    assert described(capsys, "--config", path, long)["layers"][1]["mixer"] == "Attention"
    swapped = described(capsys, "--config", path, entry, "GRU", "--model.network.block.blocks.0.mixer.kv_heads", 1)
    assert (
        swapped["layers"][0]["parameters"]
        < described(capsys, "--config", path, entry, "GRU")["layers"][0]["parameters"]
    )


ATTENTION = "Attention"
THREE_HEADS = {"class_path": "Attention", "init_args": {"heads": 3}}


def cycle(*mixers):
    return {"class_path": "Cycle", "init_args": {"blocks": [prenorm(mixer) for mixer in mixers]}}


@pytest.mark.parametrize(
    ("block", "arguments", "expected"),
    [
        (prenorm(THREE_HEADS), [], "block.mixer.heads: 3 heads must divide dim 32 into even parts"),
        (
            prenorm(ATTENTION),
            ["--model.network.block.mixer.kv_heads", "3"],
            "block.mixer.kv_heads: 3 must divide heads 8",
        ),
        (
            prenorm(ATTENTION),
            ["--model.network.block.feed_forward.hidden", "0"],
            "block.feed_forward.hidden: 0 is below 1",
        ),
        (prenorm("Atention"), [], "block.mixer: no Mixer is called 'Atention'; did you mean Attention?"),
        (prenorm("SwiGLU"), [], "block.mixer: SwiGLU is a FeedForward, and this is the place of a Mixer; there are"),
        (
            prenorm(ATTENTION),
            ["--model.network.block.feed_forward", "Attention"],
            "block.feed_forward: Attention is a Mixer, and this is the place of a FeedForward; there are",
        ),
        ("SwiGLU", [], "block: SwiGLU is a FeedForward, and this is the place of a Block; there are"),
        (cycle(*[ATTENTION] * 3), [], "block.blocks: a cycle of 3 blocks must divide depth 2"),
        (cycle(ATTENTION, THREE_HEADS), [], "block.blocks.1.mixer.heads: 3 heads must divide dim 32"),
        (cycle(ATTENTION, "Atention"), [], "block.blocks.1.mixer: no Mixer is called 'Atention'"),
        (cycle(ATTENTION, "SwiGLU"), [], "block.blocks.1.mixer: SwiGLU is a FeedForward"),
        (
            cycle(ATTENTION, {"class_path": "Attention", "init_args": {"headz": 3}}),
            [],
            "block.blocks.1.mixer.headz: not an argument of Attention; did you mean heads?",
        ),
        (
            cycle(ATTENTION, {"class_path": "Attention", "init_args": {"heads": "four"}}),
            [],
            "block.blocks.1.mixer.heads: expected int. Got value: four",
        ),
        (
            {"class_path": "Cycle", "init_args": {"blocks": prenorm(ATTENTION)}},
            [],
            "block.blocks: expected list. Got value: {'class_path': 'PreNormBlock'",
        ),
        (
            {"class_path": "PreNormBlock", "init_args": {"feed_forward": "SwiGLU"}},
            [],
            "block.mixer: not given, and PreNormBlock needs it",
        ),
        (
            cycle(ATTENTION, ATTENTION),
            ["--model.network.block.blocks.2.mixer.heads", "4"],
            "block.blocks.2: the last index of the list is 1",
        ),
        (
            prenorm(ATTENTION),
            ["--model.network.block.blocks.0.mixer", "GRU"],
            "block.blocks.0: the config has no such list",
        ),
        (
            cycle(ATTENTION, ATTENTION),
            ["--model.network.block.blocks.1.mixer", "[1"],
            "blocks.1.mixer: not valid YAML",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_key_and_the_constraint(corpus, capsys, block, arguments, expected):
    path = write("bad.yaml", block, data={"corpus": corpus, "window": 8}, trainer={"max_steps": 1})
    before = set(Path().iterdir())
    assert main(["describe", "--config", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: model.network.")
    assert expected in error
    assert {item for item in Path().iterdir() if item.name != "cache"} == before


def test_fit_and_audit_say_the_same_and_write_nothing(corpus, capsys):
    path = write(
        "bad.yaml", cycle(ATTENTION, THREE_HEADS), data={"corpus": corpus, "window": 8}, trainer={"max_steps": 1}
    )
    for verb in ("describe", "audit", "fit"):
        assert main([verb, "--config", path]) == 2
        expected = "error: model.network.block.blocks.1.mixer.heads: 3 heads must divide dim 32 into even parts\n"
        assert capsys.readouterr().err == expected
    assert {item.name for item in Path().iterdir()} == {"bad.yaml", "tiny.yaml", "cache", corpus}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--length", "0"], "--length"),
        (["--vocab_size", "0"], "vocab_size: 0 is below 1"),
        (["--vocab_size", "many"], "vocab_size: 'many' is none of"),
        (["--format", "xml"], "format: expected"),
        (["--lenght", "9"], "lenght: no such key; did you mean length?"),
    ],
)
def test_bad_options_of_describe_are_named(corpus, capsys, arguments, expected):
    path = write("plain.yaml", prenorm(ATTENTION), vocab_size=9)
    assert main(["describe", "--config", path, *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("cls", ["Asking", "AskingEarly"])
def test_a_network_that_cannot_be_built_or_run_without_numbers_is_described_all_the_same(corpus, capsys, cls):
    path = write("asking.yaml", prenorm(f"{__name__}.{cls}"), vocab_size=9)
    found = described(capsys, "--config", path)
    assert found["flops_per_token"] == 2 * (2 * (32 * 32 + 3 * 32 * 40) + 9 * 32)
    assert found["layers"][0]["state_bytes"] is None


def test_a_large_network_that_cannot_run_without_numbers_has_no_flops(corpus, capsys, monkeypatch):
    monkeypatch.setattr("llmx.costs.from_config.SMALL", 100)
    path = write("asking.yaml", prenorm(f"{__name__}.Asking"), vocab_size=9)
    assert described(capsys, "--config", path)["flops_per_token"] is None
    assert main(["describe", "--config", path]) == 0
    assert "not counted" in capsys.readouterr().out


MEMORY = """
import sys
import torch
from llmx.cli import main
from llmx.config.factories import import_collection
from llmx.runs.memory import peak_bytes

def peak():
    return peak_bytes() // 1024**2

import_collection()
before = peak()
assert main(["describe", "--config", sys.argv[1]]) == 0
print("grown by", peak() - before)
"""


def test_seventy_billion_parameters_take_no_memory():
    command = [sys.executable, "-c", MEMORY, str(CONFIGS / "scale" / "llama2_70b.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "68,976,648,192" in result.stdout
    assert int(result.stdout.split()[-1]) < 100  # MB; the weights would be 276,000
