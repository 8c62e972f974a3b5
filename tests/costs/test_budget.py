"""`describe --trainer.devices N`: what a training step costs each device, against what is measured and against sums by
hand. Bytes are whole numbers, and compared as such."""

import json
import re
import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from llmx.blocks.prenorm import PreNormBlock
from llmx.cli import main, parse
from llmx.config.command import Command
from llmx.costs.budget import Plan, budget
from llmx.costs.describe import describe
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.networks.decoder import Decoder
from llmx.networks.founding import FoundingNetwork
from testbed import tiny

CONFIGS = Path(__file__).parents[2] / "configs"
V, D, L, H, F = 65, 32, 2, 4, 40
P = L * (4 * D * D + 3 * D * F + 2 * D) + 2 * V * D + D
TENSORS = 6 * L + 3
BLOCK = partial(PreNormBlock, mixer=partial(Attention, heads=H), feed_forward=partial(SwiGLU, hidden=F))
LLAMA = partial(Decoder, V, BLOCK, dim=D, depth=L)


def of_all(cls, **settings):
    return lambda network: cls(network.parameters(), **settings)


ADAMW = of_all(torch.optim.AdamW, fused=True)


def counted(build=LLAMA, optimizer=ADAMW, devices=1, strategy="ddp", precision="32-true", sequences=4, **more):
    length, accumulate = more.pop("length", 20), more.pop("accumulate", 1)
    plan = Plan(devices, strategy, precision, sequences, accumulate)
    return budget(build, optimizer, plan, describe(build(), length), **more)


def activations(memory):
    return memory["fixed"] + memory["blocks"] + memory["outside"]


def measured(network, sequences, length, mixed):
    """Bytes of the storages that autograd holds after a real forward pass, those of the parameters aside."""
    parameters = {parameter.data_ptr() for parameter in network.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.zeros(sequences, length, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        network.losses(tokens, tokens.clone())
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("length", [20, 300])  # attention written out in 16 bits, and fused
def test_the_activations_are_those_that_autograd_keeps_of_a_real_pass(mixed, length):
    for kv_heads in (4, 1):
        block = partial(BLOCK, mixer=partial(Attention, heads=H, kv_heads=kv_heads))
        build = partial(Decoder, V, block, dim=D, depth=L)
        found = counted(build, precision="bf16-mixed" if mixed else "32-true", sequences=5, length=length)
        assert activations(found.memory) == measured(build(), 5, length, mixed)


def test_the_activations_of_a_llama_are_the_sum_by_hand():
    T, sequences = 20, 4
    norm = 4 * D + 4 + 4 * D + 4 * D  # the stream, its inverse root, the quotient, the weighted quotient
    mixer = 4 * 3 * D + 2 * 4 * D + 4 * D + 4 * H  # query, key, value; the two rotated; the output; log-sum-exp
    feed_forward = 4 * 2 * F + 4 * F + 4 * F  # gate and up; silu; the product
    memory = counted(sequences=sequences).memory
    assert memory["blocks"] == sequences * T * L * (2 * norm + mixer + feed_forward)
    assert memory["outside"] == sequences * T * (norm + 4 * V + 8 + 8)  # log-softmax, tokens, targets
    assert memory["logits_gradients"] == sequences * T * 2 * 4 * V
    table, total_weight = 4 * T * D // H, 4  # of the rotary angles, of the mean over the targets
    assert memory["fixed"] == table + total_weight
    assert memory["total"] == sum(memory.values()) - memory["total"]


def test_in_mixed_precision_the_linear_layers_keep_16_bits_and_copies_of_their_weights():
    T, sequences = 300, 4
    norm = 4 * D + 4 + 4 * D + 2 * D
    per_token = 2 * norm + 2 * (3 * D + 2 * D + D) + 4 * H + 2 * 4 * F
    memory = counted(precision="bf16-mixed", length=T, sequences=sequences).memory
    assert memory["blocks"] == sequences * T * L * per_token
    weights = P - V * D - (2 * L + 1) * D  # all but the embedding and the norms
    assert memory["fixed"] == 2 * weights + 4 * T * D // H + 4


def test_checkpointing_keeps_the_input_of_each_block_and_one_block_at_work():
    found = counted(sequences=4)
    stream, one = 4 * 20 * 4 * D, found.memory["blocks"] // L
    # the last norm keeps its input, the output of the last block, either way
    assert found.checkpointed["blocks"] == L * stream + one
    assert found.checkpointed["outside"] == found.memory["outside"]
    network = LLAMA()
    network.enable_gradient_checkpointing()
    table = 4 * 20 * D // H  # which the context holds, and not autograd
    assert activations(found.checkpointed) - one == measured(network, 4, 20, False) + table
    blocks = L * (2 * (4 * D * D + 3 * D * F) + 4 * D * 20)
    assert found.flops_checkpointed - found.flops == 80 * blocks
    assert counted(partial(FoundingNetwork, V)).checkpointed is None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_sum_is_not_below_the_peak_that_torch_tracks_in_a_step(precision, checkpointing):
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    block = partial(PreNormBlock, mixer=Attention, feed_forward=SwiGLU)
    build = partial(Decoder, 1000, block, dim=256, depth=4)
    found = counted(build, precision=precision, sequences=8, length=300)
    with FakeTensorMode():
        network = build()
        if checkpointing:
            network.enable_gradient_checkpointing()
        optimizer, tokens = ADAMW(network), torch.zeros(8, 300, dtype=torch.int64)
        memory = tracker.MemTracker()
        memory.track_external(network, optimizer, tokens)
        with memory:
            for _ in range(2):  # the first step has no optimizer states before its end
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                    loss = network.losses(tokens, tokens)[0].mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                memory.reset_mod_stats()
        (peak,) = memory.get_tracker_snapshot("peak").values()
    total = (found.checkpointed if checkpointing else found.memory)["total"]
    assert 0.6 * total < peak["Total"] < total  # gradients come while activations go


@pytest.mark.parametrize(
    ("precision", "optimizer", "numbers", "states"),
    [
        ("32-true", ADAMW, 4, 8 * P + 4 * TENSORS),
        ("bf16-mixed", ADAMW, 4, 8 * P + 4 * TENSORS),
        ("bf16-true", ADAMW, 2, 4 * P + 4 * TENSORS),
        ("32-true", of_all(torch.optim.SGD), 4, 0),
        ("32-true", of_all(torch.optim.SGD, momentum=0.9), 4, 4 * P),
    ],
)
def test_parameters_gradients_and_optimizer_states_are_exact(precision, optimizer, numbers, states):
    memory = counted(precision=precision, optimizer=optimizer).memory
    assert (memory["parameters"], memory["gradients"], memory["optimizer"]) == (numbers * P, numbers * P, states)
    network = LLAMA().to(torch.bfloat16 if numbers == 2 else torch.float32)
    made = optimizer(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    real = [v.nbytes for state in made.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert memory["optimizer"] == sum(real)


def test_16_bytes_a_parameter_as_in_zero_and_an_even_share_of_them_when_sharded():
    whole = counted(precision="bf16-mixed").memory
    share = counted(precision="bf16-mixed", devices=8, strategy="fsdp").memory
    states = ("parameters", "gradients", "optimizer")
    assert sum(whole[name] for name in states) == 16 * P + 4 * TENSORS
    assert [share[name] for name in states] == [-(-whole[name] // 8) for name in states]
    block = (P - 2 * V * D - D) // L
    assert share["buffers"] == 2 * (2 * block + 2 * V * D + D) + 4 * block
    assert share["fixed"] < 4 * V * D  # no 16-bit copies: what is gathered has 16 bits


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_device_sends_nothing_and_has_no_buffers(strategy):
    alone = counted(strategy=strategy, bandwidth=1e9)
    assert (alone.sent, alone.memory["buffers"], alone.seconds["communication"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("strategy", "precision", "a_parameter", "accumulated"),
    [
        ("ddp", "32-true", 2 * 4, 1),
        ("ddp", "bf16-mixed", 2 * 4, 1),
        ("fsdp", "32-true", 3 * 4, 3),
        ("fsdp", "bf16-mixed", 2 * 2 + 4, 3),
        ("fsdp", "bf16-true", 3 * 2, 3),
    ],
)
def test_communication_is_that_of_the_ring(strategy, precision, a_parameter, accumulated):
    found = counted(strategy=strategy, precision=precision, devices=8)
    assert found.sent == a_parameter * P * 7 // 8
    assert counted(strategy=strategy, precision=precision, devices=8, accumulate=3).sent == pytest.approx(
        accumulated * a_parameter * P * 7 / 8, abs=1
    )


def test_flops_are_shared_and_times_are_what_the_speeds_allow():
    found = counted(devices=8, sequences=4, accumulate=2, peak_flops=1e6, bandwidth=1e3)
    matrices = L * (4 * D * D + 3 * D * F) + V * D
    assert found.tokens == 8 * 4 * 2 * 20
    assert found.flops == (6 * matrices + 12 * L * D * 20) * 4 * 2 * 20
    assert found.seconds == {"arithmetic": found.flops / 1e6, "communication": found.sent / 1e3}


def test_a_network_without_blocks_or_numbers_is_described_as_far_as_it_goes():
    class Asking(Decoder):
        def losses(self, tokens, targets):
            return (super().losses if self.norm.weight.sum().item() else None)(tokens, targets)

    found = counted(partial(Asking, V, BLOCK, dim=D, depth=L))
    assert found.memory["total"] == 16 * P + 4 * TENSORS
    assert found.checkpointed is None
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(found.render())
    assert "Activations: not counted" in capture.get()


# ------------------------------------------------------------------------------------------------------------- the verb
@pytest.fixture
def config(laboratory):
    content = {"vocab_size": V, "model": {"network": tiny.network(2)}, "data": {"window": 8, "batch_size": 32}}
    laboratory.write_config(content, "plain.yaml")
    return ["describe", "--config", "plain.yaml"]


def test_the_flags_of_fit_say_what_is_described(config, capsys):
    assert main([*config, "--format", "json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    flags = ["--trainer.devices", "2", "--trainer.num_nodes", "4", "--trainer.precision", "bf16-mixed"]
    flags += ["--trainer.strategy", "ModelParallelStrategy", "--peak_flops", "1e12", "--bandwidth", "1e9"]
    flags += ["--trainer.accumulate_grad_batches", "2"]
    assert main([*config, *flags, "--format", "json"]) == 0
    step = json.loads(capsys.readouterr().out)
    found = step.pop("step")
    assert step == plain
    plan = {"devices": 8, "strategy": "fsdp", "precision": "bf16-mixed", "sequences": 2, "accumulate": 2}
    assert found["plan"] == plan
    assert found["tokens"] == 32 * 8
    assert main([*config, *flags]) == 0
    shown = capsys.readouterr().out
    assert "A training step on 8 devices with fsdp, bf16-mixed, 256 tokens" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert main([*config, "--trainer.devices", "2", "--trainer.precision", "32"]) == 0
    assert "2 devices with ddp, 32-true" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--trainer.devices", "0"], "trainer.devices: '0' is no number of devices"),
        (["--trainer.devices", "-1"], "trainer.devices: '-1' is no number of devices"),
        (["--trainer.devices", "many"], "trainer.devices: 'many' is no number of devices"),
        (["--trainer.devices", "2", "--trainer.num_nodes", "0"], "trainer.num_nodes: 0 is no number of devices"),
        (["--trainer.devices", "2", "--trainer.strategy", "foo"], "trainer.strategy: 'foo' is not described; there"),
        (["--trainer.devices", "2", "--trainer.precision", "foo"], "trainer.precision: 'foo' is none of"),
        (["--trainer.devices", "2", "--trainer.precision", "transformer-engine"], "trainer.precision: 'transformer-"),
        (["--trainer.devices", "3"], "data.batch_size: 32 windows a step cannot be cut into 3 equal parts"),
        (["--trainer.devices", "2", "--peak_flops", "0"], "peak_flops: 0.0 is not above 0"),
        (["--trainer.devices", "2", "--bandwidth", "nan"], "bandwidth: 'nan' is none of"),
        (["--trainer.devices", "2", "--bandwidth", "fast"], "bandwidth: "),
        (["--trainer.devices", "2", "--model.optimizer", "torch.optim.Adafactor"], "model.optimizer: Adafactor makes"),
        (["--peak_flops", "1e12"], "peak_flops: belongs to --trainer.devices N"),
        (["--config", str(CONFIGS / "ngram.yaml"), "--trainer.devices", "1"], "trainer.devices: NGram has no param"),
    ],
)
def test_nonsense_is_one_line_that_names_the_key(config, capsys, flags, expected):
    arguments = ["describe", "--vocab_size", "9", *flags] if "--config" in flags else [*config, *flags]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert error.count("\n") == 1


def test_the_page_shows_what_is_printed_and_its_commands_are_understood(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    page = (CONFIGS.parent / "docs" / "scaling.md").read_text()
    commands = [
        shlex.split(line)[2:]
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    for words in commands:
        parse(Command.read(words))
    (shown,) = re.findall(r"```text\n(A training step.*?)```", page, re.DOTALL)
    capsys.readouterr()
    assert main(commands[-1]) == 0
    assert " ".join(shown.split()) in " ".join(capsys.readouterr().out.split())
