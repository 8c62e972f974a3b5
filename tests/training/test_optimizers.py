"""Hybrids of two optimizers, Muon in batches, optimizers and callbacks that average: alone, and through `fit`."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from llmx import Decoder
from llmx.blocks.prenorm import PreNormBlock
from llmx.cli import main
from llmx.feedforward.mlp import MLP
from llmx.mixers.mamba import Mamba
from llmx.training import optimizers
from llmx.training.optimizers import BatchedMuon, Hybrid, orthogonalized, parameter_groups
from tests.laboratory import metrics_of, newest_run, weights_of

MUON = partial(BatchedMuon, lr=0.02)
CHOICES = {
    "hybrid": {
        "class_path": "Hybrid",
        "init_args": {
            "hidden": {"class_path": "BatchedMuon", "init_args": {"lr": 0.02}},
            "rest": {"class_path": "AdamW", "init_args": {"lr": 0.003}},
        },
    },
    "soap": {"class_path": "pytorch_optimizer.SOAP", "init_args": {"lr": 0.003, "precondition_frequency": 2}},
    "schedule-free": {"class_path": "pytorch_optimizer.ScheduleFreeAdamW", "init_args": {"lr": 0.01}},
    "average": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
}
CALLBACKS = {"average": [{"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.8}}]}
AVERAGING = ("schedule-free", "average")
POWER_CUT = """
import os
import signal
from lightning.pytorch.callbacks import Callback

class AtStepFive(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            raise RuntimeError("power cut")

class Signal(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
"""


# -------------------------------------------------------------------------------------------------------------- groups
@pytest.fixture
def mamba():
    """A network that has all kinds: matrices, kernels of convolutions, rates of two dimensions, vectors."""
    torch.manual_seed(0)
    block = partial(PreNormBlock, mixer=Mamba, feed_forward=partial(MLP, bias=True))
    return Decoder(11, dim=8, depth=2, block=block)


@pytest.mark.parametrize("decayed", ["matrices", "all"])
def test_groups_hold_every_parameter_once(mamba, decayed):
    mamba.head.requires_grad_(False)
    groups = parameter_groups(mamba, decayed)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in mamba.parameters() if parameter.requires_grad)


def test_linear_layers_of_blocks_are_hidden_and_nothing_else_is(mamba):
    names = {id(parameter): name for name, parameter in mamba.named_parameters()}
    (hidden,) = (group for group in parameter_groups(mamba, "matrices") if group["hidden"])
    kinds = {names[id(parameter)].split(".", 2)[2] for parameter in hidden["params"]}
    linears = {name for name, module in mamba.blocks[0].named_modules() if isinstance(module, nn.Linear)}
    assert kinds == {f"{name}.weight" for name in linears}


# -------------------------------------------------------------------------------------------------------------- hybrid
def trained(network, groups_to_optimizers, steps, states=None):
    """The optimizers of a copy of the network after some steps on gradients that depend on the weights."""
    found = groups_to_optimizers(parameter_groups(network, "matrices"))
    for optimizer, state in zip(found, states or [], strict=False):
        optimizer.load_state_dict(state)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = parameter.detach().sin() + 0.1
        for optimizer in found:
            optimizer.step()
    return found


def apart(groups):
    return [MUON([g for g in groups if g["hidden"]]), AdamW([g for g in groups if not g["hidden"]])]


def test_a_hybrid_is_its_two_optimizers_and_resumes_as_them(mamba):
    start = {name: value.clone() for name, value in mamba.state_dict().items()}
    trained(mamba, apart, 5)
    expected = {name: value.clone() for name, value in mamba.state_dict().items()}
    mamba.load_state_dict(start)
    (half,) = trained(mamba, lambda groups: [Hybrid(groups, MUON, AdamW)], 2)
    trained(mamba, lambda groups: [Hybrid(groups, MUON, AdamW)], 3, [half.state_dict()])
    for name, value in mamba.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_hybrid_without_linear_layers_in_blocks_is_refused():
    with pytest.raises(ValueError, match=r"^hidden: the network has no linear layers in blocks"):
        Hybrid([{"params": [nn.Parameter(torch.ones(2, 2))], "hidden": False}], MUON, AdamW)


# ---------------------------------------------------------------------------------------------------------------- muon
@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_in_batches_is_torchs_muon(monkeypatch, adjust, nesterov):
    monkeypatch.setattr(optimizers, "native_bf16", lambda accelerator: True)  # torch's is always in bf16
    results = []
    for cls in (BatchedMuon, torch.optim.Muon):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape)) for shape in ((8, 4), (4, 8), (8, 4), (6, 6))]
        optimizer = cls(weights, lr=0.1, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=adjust)
        for _ in range(3):
            for weight in weights[:-1]:  # the last never has a gradient
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        results.append(weights)
    for batched, single in zip(*results, strict=True):
        # products in a batch may be summed in another order; bf16 has 8 bits, and an update is 0.1 times about 1
        torch.testing.assert_close(batched, single, rtol=0, atol=3 * 0.1 * 2**-6)


@pytest.mark.parametrize("shape", [(3, 12, 5), (2, 5, 12), (1, 7, 7)])
def test_newton_schulz_keeps_directions_and_evens_out_their_sizes(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    y = orthogonalized(x, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    sizes = torch.einsum("nij,nik,njl->nkl", y, u, v.mT)  # diagonal where the singular vectors are the same
    off = sizes - torch.diag_embed(sizes.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.1  # bf16
    large = s > 0.1 * s.amax(1, keepdim=True)  # five iterations lift what is not too small
    assert ((sizes.diagonal(dim1=1, dim2=2) - 1).abs()[large] < 0.35).all()


# ----------------------------------------------------------------------------------------------------------- in a run
@pytest.fixture
def configure(laboratory):
    """A function that configures a choice of optimizer."""
    Path("interrupted.py").write_text(POWER_CUT)

    def configure(choice):
        schedule = {"class_path": "WarmupStableDecay", "init_args": {"warmup_steps": 2}}
        trainer = {"max_steps": 6, "val_check_interval": 3, "callbacks": CALLBACKS.get(choice, [])}
        laboratory.configure(
            trainer=trainer, model={"optimizer": CHOICES[choice], "schedule": schedule, "audit": "off"}
        )

    return configure


def final(folder):
    return metrics_of(folder)["val/loss"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_resumed_run_is_the_uninterrupted_one(laboratory, configure, choice):
    configure(choice)
    laboratory.run("fit", "--config", "tiny.yaml")
    whole = newest_run()
    with pytest.raises(RuntimeError, match="power cut"):
        main(["fit", "--config", "tiny.yaml", "--trainer.callbacks+=interrupted.AtStepFive"])
    laboratory.run("fit", "--config", "tiny.yaml", "--ckpt_path", "last")
    for name, value in weights_of(newest_run()).items():
        assert torch.equal(value, weights_of(whole)[name]), name
    assert final(newest_run()) == final(whole)


@pytest.mark.parametrize("choice", AVERAGING)
def test_what_is_saved_is_the_average_that_was_validated(laboratory, configure, choice, capsys):
    configure(choice)
    laboratory.run("fit", "--config", "tiny.yaml")
    laboratory.run("validate", "--ckpt_path", "last")
    said = f"val loss {final(newest_run()):.4f}"
    assert capsys.readouterr().out.count(said) == 2
    saved = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)
    if choice == "average":
        trained = saved["current_model_state"]
        assert not any(torch.equal(trained[name], value) for name, value in saved["state_dict"].items())
    else:
        assert not any(group["train_mode"] for group in saved["optimizer_states"][0]["param_groups"])


def test_a_signal_saves_the_average(laboratory, configure):
    configure("schedule-free")
    laboratory.run("fit", "--config", "tiny.yaml")
    whole = newest_run()
    with pytest.raises(SystemExit, match="143"):
        main(["fit", "--config", "tiny.yaml", "--trainer.callbacks+=interrupted.Signal"])
    saved = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert not any(group["train_mode"] for group in saved["optimizer_states"][0]["param_groups"])
    laboratory.run("fit", "--config", "tiny.yaml", "--ckpt_path", "last")
    # to the average and back is a rounding more than the uninterrupted run had
    assert final(newest_run()) == pytest.approx(final(whole), abs=1e-5)
