"""Sharded networks: on two processes, the losses, gradients and weights of the whole one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.spawn import start_processes

from llmx.cli import parse
from llmx.config.command import Command
from llmx.config.factories import build, to_config
from llmx.protocol import Block
from llmx.training.sharding import build_sharded, policy, shard
from testbed.forked import free_port

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("transformer", "mamba2", "griffin", "looped")  # griffin: recurrences and attention; looped: a block runs twice
VOCABULARY = 11
pytestmark = pytest.mark.xdist_group("sharding")  # the fixture's runs once, whatever the number of workers


@pytest.fixture(scope="module")
def configs():
    settings = {name: parse(Command.read(["describe", "--config", str(CONFIGS / f"{name}.yaml")])) for name in NAMES}
    return {name: to_config(of.model.network.as_dict()) for name, of in settings.items()}


def network(config):
    torch.manual_seed(3)
    return build(config, VOCABULARY, "network")


def loss(model, tokens):
    return model.losses(tokens[:, :-1], tokens[:, 1:])[0].mean()


def compare(rank, port, folder, configs):
    """On one of two processes: what a sharded network has beside a whole one, into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tokens = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(1))
    found = {}
    for name, config in configs.items():
        whole, shards = network(config), shard(network(config), mesh, policy("32-true"))
        built = build_sharded(lambda config=config: network(config), mesh, policy("32-true"))
        expected = loss(whole, tokens)
        expected.backward()
        own = loss(shards, tokens[2 * rank : 2 * rank + 2])
        own.backward()
        mean = own.detach().clone()
        dist.all_reduce(mean, dist.ReduceOp.SUM)
        found[name] = {
            "losses": (mean / 2, expected.detach()),
            "gradients": [
                (sharded.grad.full_tensor(), parameter.grad)
                for sharded, parameter in zip(shards.parameters(), whole.parameters(), strict=True)
            ],
            "weights": {
                key: value.full_tensor()
                for key, value in built.state_dict().items()
                if key in dict(built.named_parameters())
            },
            "share": sum(p.to_local().numel() for p in built.parameters()) / sum(p.numel() for p in whole.parameters()),
            "sharded": [key for key, module in built.named_modules() if isinstance(module, FSDPModule)],
            "blocks": [key for key, module in whole.named_modules() if isinstance(module, Block)],
        }
        mixed = shard(network(config), mesh, policy("bf16-mixed"))
        at_work = set()
        mixer = mixed.blocks[0].mixer  # while its block is gathered
        mixer.register_forward_hook(lambda mixer, *_, seen=at_work: seen.update(p.dtype for p in mixer.parameters()))
        with torch.autocast("cpu", torch.bfloat16):
            half = loss(mixed, tokens)
        half.backward()
        between = {p.dtype for p in mixed.parameters()} | {p.grad.dtype for p in mixed.parameters()}
        found[name] |= {"mixed": (half.detach(), expected.detach()), "dtypes": (at_work, between)}
        dcp.save(get_model_state_dict(built), checkpoint_id=folder / name)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()  # who leaves first may take the other with it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    start_processes(compare, (free_port(), folder, configs), nprocs=2, start_method="fork")
    return {"folder": folder, **torch.load(folder / "found.pt")}


@pytest.mark.parametrize("name", NAMES)
def test_a_sharded_network_has_the_loss_and_gradients_of_the_whole(found, name):
    """fp32, summed over two processes in another order: 1e-6 of the largest gradient of a parameter."""
    torch.testing.assert_close(*found[name]["losses"], rtol=0, atol=1e-6)
    for sharded, whole in found[name]["gradients"]:
        torch.testing.assert_close(sharded, whole, rtol=0, atol=2e-6 * whole.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_in_mixed_precision_16_bits_are_gathered_and_32_are_kept(found, name):
    assert found[name]["dtypes"] == ({torch.bfloat16}, {torch.float32})
    # bf16 has 8 bits; an untrained network's loss is about 2.4
    torch.testing.assert_close(*found[name]["mixed"], rtol=0, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_built_block_by_block_a_network_starts_from_the_same_weights_under_one_seed(found, configs, name):
    whole = dict(network(configs[name]).named_parameters())
    assert found[name]["weights"].keys() == whole.keys()
    assert all(torch.equal(value, whole[key]) for key, value in found[name]["weights"].items())


@pytest.mark.parametrize("name", NAMES)
def test_each_block_and_the_rest_are_sharded_and_a_process_holds_half(found, name):
    assert found[name]["sharded"] == ["", *found[name]["blocks"]]
    assert found[name]["share"] == pytest.approx(0.5, abs=0.01)  # an odd row is on one of them


@pytest.mark.parametrize("name", NAMES)
def test_what_two_processes_saved_loads_into_one(found, configs, name):
    file = found["folder"] / f"{name}.pt"
    dcp_to_torch_save(found["folder"] / name, file)
    loaded = network(configs[name])
    torch.nn.init.zeros_(next(loaded.parameters()))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for key, value in network(configs[name]).state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
