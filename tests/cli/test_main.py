"""The command line as a user meets it: small networks on a small corpus, through `main`."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmx import LanguageModel
from llmx.cli import main
from testbed.tiny import TEXT, network
from tests.laboratory import newest_run

LEAKY = """
import torch
from llmx.protocol import Mixer

class Leaky(Mixer):
    def __init__(self, site):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(site.dim))

    def forward(self, x, context):
        return x.mean(1, keepdim=True) * self.weight + x
"""

OPENING = """
import torch
from llmx.protocol import Mixer

class Opening(Mixer):
    def __init__(self, site):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(site.dim))
        self.register_buffer("steps", torch.zeros(()))

    def after_optimizer_step(self):
        self.steps += 1

    def forward(self, x, context):
        return x * self.weight + x.mean(1, keepdim=True) * (self.steps > 2)
"""


POWER_CUT = """
from lightning.pytorch.callbacks import Callback

class PowerCut(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7:
            raise RuntimeError("power cut")
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A working directory with a corpus and a configuration of a tiny Llama."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "cache"))
    Path("corpus.txt").write_text(TEXT)
    config = {
        "seed_everything": 3,
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 4,
            "log_every_n_steps": 2,
            "enable_progress_bar": False,
            "gradient_clip_val": 1.0,
            "precision": "32-true",  # so that losses compare to 1e-5
        },
        "data": {"corpus": "corpus.txt", "window": 8, "batch_size": 4},
        "model": {
            "network": network(depth=2),
            "sampling": {"max_new_tokens": 12},
        },
    }
    write_config("tiny.yaml", config)
    return config


def write_config(path, config):
    Path(path).write_text(yaml.safe_dump(config, sort_keys=False))


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def fails(capsys, *arguments):
    """The one message of a command that must fail, without leaving a run folder."""
    before = set(Path().glob("lightning_logs/*"))
    code = main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in error
    assert error.count("error: ") == 1
    assert set(Path().glob("lightning_logs/*")) == before
    return error[error.index("error: ") :]


def fit(*arguments):
    run("fit", "--config", "tiny.yaml", *arguments)
    return newest_run()


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_leaves_a_run_that_tells_everything(lab, capsys):
    folder = fit()
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"val loss {metrics['val/loss']:.4f}" in last_line
    assert f"perplexity {math.exp(metrics['val/loss']):.4f}" in last_line
    assert f"{metrics['val/loss'] / math.log(2):.4f} bits per character" in last_line
    assert str(folder / "checkpoints/last.ckpt") in last_line
    assert metrics["step"] == 6
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["characters"] == len(TEXT)
    assert record["versions"]["torch"] == torch.__version__
    assert record["leaking"] is False
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    checkpoints = {path.name for path in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "step=6.ckpt", "last.ckpt"}
    assert (folder / "checkpoints/last.ckpt").resolve().name == "step=6.ckpt"


def test_a_run_keeps_the_loss_of_each_character_that_it_was_validated_on(lab):
    folder = fit("--data.val_stride", 3)
    losses = np.load(folder / "val_losses.npy")
    metrics = json.loads((folder / "metrics.json").read_text())
    model = LanguageModel.load_from_checkpoint(folder / "checkpoints/last.ckpt")
    tokens = torch.from_numpy(model.tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])).long()
    assert losses.shape == (len(tokens) - 1,)
    assert losses.mean(dtype=np.float64) == pytest.approx(metrics["val/loss"], abs=1e-6)
    first, last = tokens[None, :9], tokens[None, -9:]  # a window, and the one that ends with the split
    for window, kept in ((first, losses[:8]), (last, losses[-1:])):
        expected = model.network.losses(window[:, :-1], window[:, 1:])[0][0, -len(kept) :]
        torch.testing.assert_close(torch.from_numpy(kept), expected.detach(), rtol=0, atol=1e-5)  # fp32, other batches


def test_tensorboard_has_the_curves_samples_influence_and_hparams(lab):
    folder = fit()
    curves = scalars(folder)
    assert {"train/loss", "val/loss", "val/perplexity", "val/bits_per_char", "train/tokens_per_second", "lr"} <= set(
        curves
    )
    assert len(curves["val/loss"]) == 2  # after step 4, and at the end
    assert [step for step, _ in curves["train/loss"]] == [1, 3, 5]
    assert all(math.isfinite(value) for points in curves.values() for _, value in points)
    for split in ("train", "val"):  # of 4 x 8 tokens a step
        assert curves[f"loss_by_tokens/{split}"] == [(32 * (step + 1), loss) for step, loss in curves[f"{split}/loss"]]
    final = {name.removeprefix("final/"): points for name, points in curves.items() if name.startswith("final/")}
    assert final.keys() == {"loss", "perplexity", "bits_per_char", "parameters", "seconds"}
    assert final["loss"] == [(5, curves["val/loss"][-1][1])]
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert "custom_scalars__config__" in tags["tensors"]
    assert "audit/influence" in tags["images"]
    assert "samples/text_summary" in tags["tensors"]
    content = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    assert b"_hparams_/session_start_info" in content
    assert b"model/network/dim" in content


def test_the_last_step_is_validated_and_saved_wherever_the_interval_falls(lab):
    folder = fit("--trainer.max_steps", 7, "--trainer.val_check_interval", 5)
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7
    assert len(scalars(folder)["val/loss"]) == 2


def test_resuming_continues_the_run_as_if_it_had_not_stopped(lab):
    whole = fit("--trainer.max_steps", 12)
    Path("power_cut.py").write_text(POWER_CUT)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "12", "--trainer.callbacks", "power_cut.PowerCut"])
    run("fit", "--ckpt_path", "last", "--trainer.callbacks", "null")
    assert {path.name for path in Path("lightning_logs").iterdir()} == {"version_0", "version_1"}
    part = Path("lightning_logs/version_1")
    assert all(torch.equal(value, weights(part)[name]) for name, value in weights(whole).items())
    for tag in ("train/loss", "val/loss", "lr", "loss_by_tokens/train", "loss_by_tokens/val"):
        assert scalars(part)[tag] == scalars(whole)[tag]
    assert (
        json.loads((part / "metrics.json").read_text())["val/loss"]
        == json.loads((whole / "metrics.json").read_text())["val/loss"]
    )


def test_validate_test_and_predict_need_the_checkpoint_alone(lab, capsys):
    folder = fit("--data.split", "[0.8, 0.1, 0.1]")
    expected = json.loads((folder / "metrics.json").read_text())["val/loss"]
    checkpoint = folder / "checkpoints/last.ckpt"
    capsys.readouterr()
    run("validate", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar", "false")
    assert f"val loss {expected:.4f}" in capsys.readouterr().out
    run("test", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar", "false")
    assert "test loss" in capsys.readouterr().out
    Path("corpus.txt").unlink()  # generation never needs the corpus
    run("predict", "--ckpt_path", checkpoint, "--data.prompts", '["the ", "fox"]', "--data.samples", 2)
    records = [json.loads(line) for line in (folder / "predictions/0.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["the ", "the ", "fox", "fox"]
    assert all(record["text"].startswith(record["prompt"]) for record in records)
    assert all(len(record["completion"]) == 12 for record in records)
    assert records[0]["completion"] != records[1]["completion"]
    assert len(list(Path("lightning_logs").iterdir())) == 1


def test_prompts_come_from_a_file_and_sampling_from_the_command_line(lab):
    folder = fit()
    Path("prompts.txt").write_text("the\nlazy dogs\n")
    arguments = ["--data.prompts", "prompts.txt", "--model.sampling.max_new_tokens", 5]
    for _ in range(2):
        run("predict", "--ckpt_path", folder / "checkpoints/last.ckpt", *arguments, "--model.sampling.temperature", 0)
    first, second = [(folder / f"predictions/{n}.jsonl").read_text() for n in (0, 1)]
    assert first == second
    assert [json.loads(line)["prompt"] for line in first.splitlines()] == ["the", "lazy dogs"]


def test_the_command_line_beats_the_checkpoint_and_the_run(lab):
    folder = fit()
    checkpoint = folder / "checkpoints/last.ckpt"
    run("fit", "--ckpt_path", checkpoint, "--trainer.max_steps", 8, "--model.optimizer.lr", 0.5)
    resumed = torch.load(checkpoint, weights_only=True)
    assert resumed["hyper_parameters"]["optimizer"]["init_args"]["lr"] == 0.5
    assert resumed["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.5
    rates = dict(scalars(folder)["lr"])
    assert rates[7] > 0.01  # the old run's rate was at most 0.003


def test_accumulation_and_restart_change_nothing_but_memory(lab):
    plain, accumulated = fit(), fit("--trainer.accumulate_grad_batches", 2)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(accumulated)[name], value, rtol=0, atol=1e-5)  # fp32 sums in another order
    a, b = (scalars(folder)["val/loss"] for folder in (plain, accumulated))
    assert [value for _, value in b] == pytest.approx([value for _, value in a], abs=1e-5)


def test_fast_dev_run_leaves_nothing_behind(lab):
    run("fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true")
    assert not Path("lightning_logs").exists()


def test_trainer_flags_reach_the_trainer(lab):
    folder = fit(
        "--trainer.precision", "bf16-mixed", "--trainer.profiler", "simple", "--model.gradient_checkpointing", "true"
    )
    assert json.loads((folder / "run.json").read_text())["precision"] == "bf16-mixed"


def test_warm_start_begins_with_another_runs_weights(lab):
    first = fit()
    fit("--model.warm_start", first / "checkpoints/last.ckpt", "--model.optimizer.lr", 0.0, "--trainer.max_steps", 1)
    before, after = weights(first), weights(Path("lightning_logs/version_1"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_text_that_the_weights_were_trained_on_is_named_beside_the_loss(lab, capsys):
    last = fit() / "checkpoints/last.ckpt"
    run("validate", "--ckpt_path", last)
    Path("reversed.txt").write_text(TEXT[::-1])
    run("validate", "--ckpt_path", last, "--data.corpus", "reversed.txt", "--data.split", "[0.8, 0.2, 0.0]")
    assert "trained on" not in capsys.readouterr().out
    half = "50 % of this val split is text that its weights were trained on."
    run("validate", "--ckpt_path", last, "--data.split", "[0.8, 0.2, 0.0]")
    assert half in capsys.readouterr().out
    second = fit("--model.warm_start", last, "--data.split", "[0.4, 0.5, 0.1]")
    assert "100 % of this val split" in capsys.readouterr().out
    run("test", "--ckpt_path", second / "checkpoints/last.ckpt", "--data.split", "[0.4, 0.4, 0.2]")
    assert half.replace("val", "test") in capsys.readouterr().out


def test_a_loss_that_chose_its_weights_is_told_from_one_that_did_not(lab, capsys):
    folder = fit()
    chosen = "chosen for the lowest loss on a val split"
    run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert chosen not in capsys.readouterr().out
    run("validate", "--ckpt_path", folder / "checkpoints/best.ckpt")
    assert chosen in capsys.readouterr().out


def test_a_loss_of_a_part_of_the_split_says_so(lab, capsys):
    last = fit() / "checkpoints/last.ckpt"
    run("validate", "--ckpt_path", last)
    assert "was measured" not in capsys.readouterr().out
    fit("--trainer.limit_val_batches", 1)
    part = capsys.readouterr().out
    assert re.search(r"Only [\d.]+ % of this val split was measured", part)
    run("validate", "--ckpt_path", last, "--trainer.limit_val_batches", 1)
    assert "% of this val split was measured" in capsys.readouterr().out
    run("test", "--ckpt_path", last, "--data.split", "[0.4, 0.3, 0.3]", "--trainer.limit_test_batches", 1)
    assert "% of this test split was measured" in capsys.readouterr().out
    assert "trainer.limit_val_batches: no batch" in fails(
        capsys, "validate", "--ckpt_path", last, "--trainer.limit_val_batches", 0
    )


def test_a_command_that_lacks_the_essential_is_told_what(lab, capsys):
    assert "fit, validate, test, predict, audit, describe" in fails(capsys)
    assert "--config" in fails(capsys, "fit", "--trainer.max_steps", 5)


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("fit", "validate", "predict", "audit", "describe", "sweep", "compare"))


# --------------------------------------------------------------------------------------------------------- fast path
def test_compilation_changes_nothing_but_speed_and_happens_once_a_mode(lab):
    torch._dynamo.reset()
    eager = fit("--model.compile", "false")
    torch._dynamo.utils.counters.clear()
    compiled = fit("--model.compile", "true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # training and evaluation, ragged batches too
    assert [json.loads((run / "run.json").read_text())["compiled"] for run in (eager, compiled)] == [False, True]
    assert weights(eager).keys() == weights(compiled).keys()
    losses = [json.loads((run / "metrics.json").read_text())["val/loss"] for run in (eager, compiled)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)  # fp32, fused sums in another order


def test_a_run_that_ends_in_its_warm_up_says_so(lab, caplog):
    fit("--model.schedule.warmup_steps", 3)
    assert "model.schedule" not in caplog.text
    fit("--model.schedule.warmup_steps", 7)
    assert "in 6 steps the learning rate rises to 75 % of that of model.optimizer" in caplog.text


def test_without_a_compiler_the_run_is_eager_and_says_so(lab, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    folder = fit("--model.compile", "true")
    assert json.loads((folder / "run.json").read_text())["compiled"] is False
    assert "No C++ compiler was found" in caplog.text


def test_the_step_of_a_long_generation_is_compiled_once_and_gives_the_same_text(lab, monkeypatch):
    model = LanguageModel.load_from_checkpoint(fit() / "checkpoints/last.ckpt").double()  # no argmax near a tie
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = model.generate("e", max_new_tokens=60, temperature=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    monkeypatch.setattr("llmx.training.sampling.COMPILE_DECODING_FROM", 60)
    assert [model.generate("e", max_new_tokens=60, temperature=0) for _ in range(2)] == [eager, eager]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()  # as in another process, which finds what this one compiled
    torch._dynamo.utils.counters.clear()
    assert model.generate("e", max_new_tokens=60, temperature=0) == eager
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_bf16_agrees_with_fp32(lab):
    single = fit("--trainer.max_steps", 40)
    mixed = fit("--trainer.max_steps", 40, "--trainer.precision", "bf16-mixed")
    losses = [json.loads((run / "metrics.json").read_text())["val/loss"] for run in (single, mixed)]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)  # bf16 keeps 8 bits: about 0.4 % a product, averaged out


def test_a_loss_by_bytes_is_said_to_be_one(lab, capsys):
    Path("corpus.txt").write_text(TEXT.replace("e", "é"), encoding="utf-8")
    fit("--data.tokenizer", "byte", "--model.sampling.max_new_tokens", 4)
    assert " nats per byte, " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- leaks
@pytest.fixture
def leaky(lab):
    Path("leaky_mixer.py").write_text(LEAKY)
    block = lab["model"]["network"]["init_args"]["block"]["init_args"]
    block["mixer"] = {"class_path": "leaky_mixer.Leaky"}
    write_config("tiny.yaml", lab)
    yield lab
    sys.modules.pop("leaky_mixer", None)


def test_a_leak_stops_the_run_and_names_its_module(leaky, capsys):
    message = fails(capsys, "fit", "--config", "tiny.yaml")
    assert "blocks.0.mixer (Leaky)" in message
    assert "--model.audit warn" in message


def test_a_leak_that_is_let_through_marks_the_run(leaky, capsys):
    folder = fit("--model.audit", "warn")
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads((folder / "run.json").read_text())["leaking"] is True
    assert json.loads((folder / "metrics.json").read_text())["leaking"] is True
    run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]


def test_the_audit_verb_exits_with_1_for_a_leak(leaky, capsys):
    assert main(["audit", "--config", "tiny.yaml", "--model.audit", "warn"]) == 1
    assert "blocks.0.mixer (Leaky)" in " ".join(capsys.readouterr().out.split())


def test_the_audit_verb_passes_an_honest_network(lab, capsys):
    run("audit", "--config", "tiny.yaml")
    assert "no leak" in " ".join(capsys.readouterr().out.split())
    assert not Path("lightning_logs").exists()


def test_audit_of_a_leaking_checkpoint_measures_it_with_the_future_hidden(leaky, capsys):
    folder = fit("--model.audit", "warn")
    capsys.readouterr()
    assert main(["audit", "--ckpt_path", str(folder / "checkpoints/last.ckpt")]) == 1
    assert "with the future hidden" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("x[:, 1:]", "model.network: blocks.0.mixer (Leaky) gives (1, 7, 8) for (1, 8, 8)"),
        ("(x, None)", "model.network: blocks.0.mixer (Leaky) gives a tuple for (1, 8, 8)"),
        ("x.unpack()", "leaky_mixer.py, line 11, in forward: AttributeError: 'Tensor' object has no attribute"),
    ],
)
def test_a_mistake_in_a_mixer_of_ones_own_is_said_with_its_name_or_line(leaky, capsys, returned, expected):
    Path("leaky_mixer.py").write_text(LEAKY.replace("x.mean(1, keepdim=True) * self.weight + x", returned))
    assert expected in fails(capsys, "fit", "--config", "tiny.yaml")


def test_streams_that_no_block_adds_up_are_refused(lab, capsys):
    block = {"mixer": "Attention", "feed_forward": "SwiGLU"}
    streams = {"class_path": "HyperConnectionBlock", "init_args": {**block, "streams": 4}}
    plain = {"class_path": "MixerOnlyBlock", "init_args": {"mixer": "GatedLinearAttention"}}  # takes any row
    cycle = {"class_path": "Cycle", "init_args": {"blocks": [streams, plain]}}
    lab["model"]["network"]["init_args"] |= {"block": cycle, "dim": 16}
    write_config("tiny.yaml", lab)
    assert "model.network: gives (1, 8, 4, " in fails(capsys, "fit", "--config", "tiny.yaml")


@pytest.fixture
def opening(lab):
    Path("opening_mixer.py").write_text(OPENING)
    lab["model"]["network"]["init_args"]["block"]["init_args"]["mixer"] = {"class_path": "opening_mixer.Opening"}
    write_config("tiny.yaml", lab)
    yield lab
    sys.modules.pop("opening_mixer", None)


def test_a_leak_that_training_opens_stops_the_run_at_its_validation(opening, capsys):
    assert main(["fit", "--config", "tiny.yaml"]) == 2
    assert "the network leaks: the loss at position" in capsys.readouterr().err
    assert not (newest_run() / "metrics.json").exists()


def test_a_leak_in_the_precision_of_the_run_alone_stops_it(leaky, capsys):
    Path("leaky_mixer.py").write_text(LEAKY.replace("keepdim=True)", "keepdim=True) * (x.dtype != torch.float64)"))
    message = fails(capsys, "fit", "--config", "tiny.yaml")
    assert "in the run's own precision and on its device" in message


def test_a_leak_that_training_opens_marks_run_and_checkpoint_where_it_is_let_through(opening, capsys):
    with pytest.warns(UserWarning, match="LEAKING at step 4: the loss at position"):
        folder = fit("--model.audit", "warn")
    assert json.loads((folder / "metrics.json").read_text())["leaking"] is True
    capsys.readouterr()
    assert main(["audit", "--ckpt_path", str(folder / "checkpoints/last.ckpt"), "--trust", "opening_mixer"]) == 1
    assert "LEAKING" in (shown := " ".join(capsys.readouterr().out.split()))
    assert "with the future hidden" in shown
    run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt", "--trust", "opening_mixer")
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.network.dimm", 4], "model.network.dimm: not an argument of Decoder; did you mean dim?"),
        (["--model.network.block.mixer.headz", 4], "model.network.block.mixer.headz: not an argument of Attention"),
        (["--model.network.block.mixer", "Atention"], "no Mixer is called 'Atention'; did you mean Attention?"),
        (["--model.network.block.mixer.heads", "four"], "model.network.block.mixer.heads: expected int"),
        (["--model.network.block.mixer.heads", 3], "error: model.network.block.mixer.heads: 3 heads must divide dim 8"),
        (["--model.netwrk.dim", 4], "model.netwrk: not an argument of LanguageModel; did you mean network?"),
        (["--trainer.max_stepz", 4], "trainer.max_stepz: not an argument of Trainer; did you mean max_steps?"),
        (["--trainer.max_steps", 0], "trainer.max_steps: 0"),
        (["--model.audit", "maybe"], "model.audit: expected"),
        (["--model.sampling.top_p", 2], "model.sampling.top_p: 2.0 is not in (0, 1]"),
        (["--data.window", 2000], "data.window is 2000"),
        (["--data.corpus", "empty.txt"], "empty.txt"),
        (["--data.corpus", "latin.txt"], "offset 5"),
        (["--data.corpus", "tinyshakespere"], "tinyshakespeare"),
        (["--data.batch_size", 3, "--trainer.accumulate_grad_batches", 2], "data.batch_size is 3"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: no checkpoint at nowhere.ckpt"),
        (["--ckpt_path", "last"], "ckpt_path: 'last' found no run"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--trainer.accelerator", "abacus"], "trainer: You selected an invalid accelerator"),
        (["--trainer.devices", 0], "trainer: "),
        (["--trainer.accumulate_grad_batches", 0], "trainer.accumulate_grad_batches: 0 is below 1"),
        (["--trainer.val_check_interval", 0], "trainer.val_check_interval: 0"),
        (["--trainer.val_check_interval", -1], "val_check_interval"),
        (["--seed_everything", -1], "seed_everything: "),
        (["--trainer.default_root_dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--trainer.callbacks", "MixerMaps", "--trainer.callbacks.sentence", "é"], "trainer.callbacks.sentence: the"),
        # found by benchmarks/fuzz.py
        (["--trainer", "null"], "trainer: "),
        (["--config", ""], "config: "),
        (["--model.sampling", "[]"], "model.sampling: "),
        (["--model.sampling.seed", 10**30], "model.sampling.seed: "),
        (["--model.network.block", ".."], "model.network.block: no Block is called '..'"),
        (["--model.network.dropout", "null"], "model.network.dropout: null is not a value for it"),
        (["--model.network.block.mixer.dropout", 4], "model.network: a window of 8 does not pass"),
        (["--model.network.dim", 10**14], "model.network.embedding: TokenEmbedding: "),  # bytes beyond any machine's
        (["--model.optimizer.lr", -1], "model.optimizer: AdamW: Invalid learning rate"),
        (["--model.optimizer.lrx", 1], "model.optimizer.lrx: not an argument of AdamW; did you mean lr?"),
        (["--model.schedule.warmup_steps", -1], "model.schedule.warmup_steps: -1 is below 0"),
        (["--data.batch_size", 10**18], "out of memory"),
    ],
)
def test_bad_input_is_one_message_that_names_the_key(lab, capsys, arguments, expected):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xc3\xa9" + b"\xe9" + b" au lait" * 100)
    assert expected in fails(capsys, "fit", "--config", "tiny.yaml", *arguments)


def test_what_is_wrong_is_not_an_argument_of_the_class_before(lab, capsys):
    """The first optimizer's lr is not the second's."""
    adamw = "{model: {optimizer: {class_path: AdamW, init_args: {lr: 0.1}}}}"
    hybrid = "{model: {optimizer: {class_path: Hybrid, init_args: {hidden: BatchedMuon}}}}"
    configs = ["--config", "tiny.yaml", "--config", adamw, "--config", hybrid]
    assert "trainer.max_steps: expected int" in fails(capsys, "fit", *configs, "--trainer.max_steps", "x")


def test_a_config_of_a_part_alone_needs_a_network(lab, capsys):
    said = fails(capsys, "fit", "--config", "{model: {network: {init_args: {dim: 8}}}}")
    assert "model.network: give a class name" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("heads: 2", "headz: 2"),
            "model.network.block.mixer.headz: not an argument of Attention; did you mean heads?",
        ),
        (("Attention", "Atention"), "model.network.block.mixer: no Mixer is called 'Atention'"),
        (("model:", "modle:"), "modle: no such key; did you mean model?"),
        (("dim: 8", "dim: wide"), "model.network.dim: expected int"),
        (("window: 8", "windows: 8"), "data.windows: not an argument of TextDataModule; did you mean window?"),
        (("heads: 2", "heads: [2"), "config: tiny.yaml: not valid YAML"),
        (("trainer:", "trainer: 5\nmore:"), "more: no such key"),
        (("window: 8", "window: null"), "data.window: null"),
        (("heads: 2", "- 2"), "model.network.block.mixer.init_args: give keys"),
        # found by benchmarks/fuzz.py
        (("trainer:", "trainer:\nmore:"), "more: no such key"),
        (("max_new_tokens: 12", "class_path: GRU"), "model.sampling.class_path: nothing else can stand here"),
        (("dim: 8", "dim: " + "[" * 3000 + "]" * 3000), "config: tiny.yaml: is nested too deeply"),
        (("dim: 8", "dim: &a [*a]"), "config: tiny.yaml: model.network.init_args.dim.0"),
        (("window: 8", "window: 2020-01-01"), "config: tiny.yaml: data.window: a date is not plain data"),
        (("window: 8", "window: 2020-13-45"), "config: tiny.yaml: not valid YAML: month"),
        (("corpus: corpus.txt", 'corpus: "\\uD800"'), "config: tiny.yaml: data.corpus: half of a surrogate pair"),
        (("corpus: corpus.txt", 'corpus: "\\U00010000\\x9a"'), "data.corpus: "),
    ],
)
def test_a_mistake_in_the_yaml_is_named_by_its_full_path(lab, capsys, change, expected):
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace(*change))
    assert expected in fails(capsys, "fit", "--config", "tiny.yaml")


@pytest.mark.parametrize("content", [b"data: \xff", "data: {}".encode("utf-16"), b"- 1", b"5"])
def test_a_file_that_is_no_config_is_named(lab, capsys, content):
    Path("tiny.yaml").write_bytes(content)
    assert "config: tiny.yaml: " in fails(capsys, "fit", "--config", "tiny.yaml")


def test_files_of_a_run_that_were_changed_are_named(lab, capsys):
    folder = fit()
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    torch.save({**checkpoint, "llmx": None}, "changed.ckpt")
    assert "changed.ckpt" in fails(capsys, "validate", "--ckpt_path", "changed.ckpt")
    del checkpoint["optimizer_states"]  # as ModelCheckpoint does with save_weights_only
    torch.save(checkpoint, "weights.ckpt")
    assert "weights.ckpt holds weights alone" in fails(capsys, "fit", "--ckpt_path", "weights.ckpt")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "val/loss": 1e-5}))  # a number for JSON, text for YAML
    np.save(folder / "val_losses.npy", np.full_like(np.load(folder / "val_losses.npy"), 1e-5))
    run("compare", folder)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "seconds": "many"}))
    assert "metrics.json: seconds is missing or damaged" in fails(capsys, "compare", folder)
    (folder / "config.yaml").write_text("a: b")
    assert "a: no such key" in fails(capsys, "fit", "--ckpt_path", "last")


def test_damaged_and_foreign_checkpoints_are_refused(lab, capsys):
    checkpoint = fit() / "checkpoints/last.ckpt"
    content = checkpoint.read_bytes()
    Path("cut.ckpt").write_bytes(content[: len(content) // 2])
    Path("empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, "foreign.ckpt")
    for name in ("cut.ckpt", "empty.ckpt"):
        assert f"{name} is damaged" in fails(capsys, "validate", "--ckpt_path", name)
    assert "not a checkpoint of a LanguageModel" in fails(capsys, "validate", "--ckpt_path", "foreign.ckpt")
    message = fails(capsys, "validate", "--config", "tiny.yaml", "--model.network.dim", 16, "--ckpt_path", checkpoint)
    assert "another network" in message


class Exploit:
    def __reduce__(self):
        return (Path("executed").touch, ())


def test_a_checkpoint_with_code_is_refused_and_nothing_runs(lab, capsys):
    torch.save({"state_dict": {}, "hyper_parameters": {"network": Exploit()}}, "exploit.ckpt")
    assert "refused" in fails(capsys, "predict", "--ckpt_path", "exploit.ckpt")
    assert not Path("executed").exists()


def test_a_prompt_outside_the_vocabulary_names_the_character(lab, capsys):
    checkpoint = fit() / "checkpoints/last.ckpt"
    assert "'é'" in fails(capsys, "predict", "--ckpt_path", checkpoint, "--data.prompts", "café")
    assert "ckpt_path" in fails(capsys, "predict", "--config", "tiny.yaml")


def test_an_empty_test_split_is_a_message(lab, capsys):
    checkpoint = fit() / "checkpoints/last.ckpt"
    assert "data.split" in fails(capsys, "test", "--ckpt_path", checkpoint)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(lab, capsys):
    lab["trainer"] |= {"max_steps": 40, "val_check_interval": 1, "gradient_clip_val": None}
    write_config("tiny.yaml", lab)
    code = main(["fit", "--config", "tiny.yaml", "--model.optimizer.lr", "1e30"])
    error = capsys.readouterr().err
    assert code == 2
    assert "training has diverged" in error
    assert "last good checkpoint" in error
    state = torch.load(newest_run() / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


# -------------------------------------------------------------------------------------------------------- the notebook
def test_the_same_objects_serve_in_a_notebook(lab):
    from functools import partial

    from lightning.pytorch import Trainer

    from llmx import Decoder, LanguageModel, TextDataModule
    from llmx.blocks.prenorm import PreNormBlock
    from llmx.feedforward.swiglu import SwiGLU
    from llmx.mixers.attention import Attention

    data = TextDataModule(corpus="corpus.txt", window=8, batch_size=4)
    block = partial(PreNormBlock, mixer=partial(Attention, heads=2), feed_forward=partial(SwiGLU, hidden=8))
    model = LanguageModel(partial(Decoder, dim=8, depth=1, block=block), tokenizer=data.tokenizer, window=data.window)
    trainer = Trainer(max_steps=5, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint("notebook.ckpt")
    loaded = LanguageModel.load_from_checkpoint("notebook.ckpt")
    expected = model.generate("the ", max_new_tokens=30, temperature=0)
    assert loaded.generate("the ", max_new_tokens=30, temperature=0) == expected
    assert expected.startswith("the ")
    assert len(expected) == 34
    run("predict", "--ckpt_path", "notebook.ckpt", "--data.prompts", "fox")
