"""The command line as a user meets it: small networks on a small corpus, through `main`."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmx import LanguageModel
from llmx.cli import main
from testbed.tiny import TEXT
from tests.laboratory import curves_of, metrics_of, record_of, weights_of


def test_fit_leaves_a_run_that_tells_everything(laboratory, capsys):
    folder = laboratory.fit()
    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    metrics = metrics_of(folder)
    assert f"val loss {metrics['val/loss']:.4f}" in last_line
    assert f"perplexity {math.exp(metrics['val/loss']):.4f}" in last_line
    assert f"{metrics['val/loss'] / math.log(2):.4f} bits per character" in last_line
    assert str(folder / "checkpoints/last.ckpt") in last_line
    assert metrics["step"] == 6
    record = record_of(folder)
    assert record["data"]["characters"] == len(TEXT)
    assert record["versions"]["torch"] == torch.__version__
    assert record["leaking"] is False
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_steps"] == 6
    checkpoints = {path.name for path in (folder / "checkpoints").iterdir()}
    assert checkpoints == {"best.ckpt", "step=6.ckpt", "last.ckpt"}
    assert (folder / "checkpoints/last.ckpt").resolve().name == "step=6.ckpt"


def test_a_run_keeps_the_loss_of_each_character_that_it_was_validated_on(laboratory):
    folder = laboratory.fit("--data.val_stride", 3)
    losses = np.load(folder / "val_losses.npy")
    metrics = metrics_of(folder)
    model = LanguageModel.load_from_checkpoint(folder / "checkpoints/last.ckpt")
    tokens = torch.from_numpy(model.tokenizer.encode(TEXT[int(0.9 * len(TEXT)) :])).long()
    assert losses.shape == (len(tokens) - 1,)
    assert losses.mean(dtype=np.float64) == pytest.approx(metrics["val/loss"], abs=1e-6)
    first, last = tokens[None, :9], tokens[None, -9:]  # a window, and the one that ends with the split
    for window, kept in ((first, losses[:8]), (last, losses[-1:])):
        expected = model.network.losses(window[:, :-1], window[:, 1:])[0][0, -len(kept) :]
        torch.testing.assert_close(torch.from_numpy(kept), expected.detach(), rtol=0, atol=1e-5)  # fp32, other batches


def test_tensorboard_has_the_curves_samples_influence_and_hparams(laboratory):
    folder = laboratory.fit()
    curves = curves_of(folder)
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


def test_the_last_step_is_validated_and_saved_wherever_the_interval_falls(laboratory):
    folder = laboratory.fit("--trainer.max_steps", 7, "--trainer.val_check_interval", 5)
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7
    assert len(curves_of(folder)["val/loss"]) == 2


def test_validate_test_and_predict_need_the_checkpoint_alone(laboratory, capsys):
    folder = laboratory.fit("--data.split", "[0.8, 0.1, 0.1]")
    expected = metrics_of(folder)["val/loss"]
    checkpoint = folder / "checkpoints/last.ckpt"
    capsys.readouterr()
    laboratory.run("validate", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar", "false")
    assert f"val loss {expected:.4f}" in capsys.readouterr().out
    laboratory.run("test", "--ckpt_path", checkpoint, "--trainer.enable_progress_bar", "false")
    assert "test loss" in capsys.readouterr().out
    Path("corpus.txt").unlink()  # generation never needs the corpus
    laboratory.run("predict", "--ckpt_path", checkpoint, "--data.prompts", '["the ", "fox"]', "--data.samples", 2)
    records = [json.loads(line) for line in (folder / "predictions/0.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["the ", "the ", "fox", "fox"]
    assert all(record["text"].startswith(record["prompt"]) for record in records)
    assert all(len(record["completion"]) == 12 for record in records)
    assert records[0]["completion"] != records[1]["completion"]
    assert len(list(Path("lightning_logs").iterdir())) == 1


def test_prompts_come_from_a_file_and_sampling_from_the_command_line(laboratory):
    folder = laboratory.fit()
    Path("prompts.txt").write_text("the\nlazy dogs\n")
    arguments = ["--data.prompts", "prompts.txt", "--model.sampling.max_new_tokens", 5]
    for _ in range(2):
        laboratory.run(
            "predict", "--ckpt_path", folder / "checkpoints/last.ckpt", *arguments, "--model.sampling.temperature", 0
        )
    first, second = [(folder / f"predictions/{n}.jsonl").read_text() for n in (0, 1)]
    assert first == second
    assert [json.loads(line)["prompt"] for line in first.splitlines()] == ["the", "lazy dogs"]


def test_accumulation_and_restart_change_nothing_but_memory(laboratory):
    plain, accumulated = laboratory.fit(), laboratory.fit("--trainer.accumulate_grad_batches", 2)
    for name, value in weights_of(plain).items():
        torch.testing.assert_close(
            weights_of(accumulated)[name], value, rtol=0, atol=1e-5
        )  # fp32 sums in another order
    a, b = (curves_of(folder)["val/loss"] for folder in (plain, accumulated))
    assert [value for _, value in b] == pytest.approx([value for _, value in a], abs=1e-5)


def test_fast_dev_run_leaves_nothing_behind(laboratory):
    laboratory.run("fit", "--config", "tiny.yaml", "--trainer.fast_dev_run", "true")
    assert not Path("lightning_logs").exists()


def test_trainer_flags_reach_the_trainer(laboratory):
    folder = laboratory.fit(
        "--trainer.precision", "bf16-mixed", "--trainer.profiler", "simple", "--model.gradient_checkpointing", "true"
    )
    assert record_of(folder)["precision"] == "bf16-mixed"


def test_text_that_the_weights_were_trained_on_is_named_beside_the_loss(laboratory, capsys):
    last = laboratory.fit() / "checkpoints/last.ckpt"
    laboratory.run("validate", "--ckpt_path", last)
    Path("reversed.txt").write_text(TEXT[::-1])
    laboratory.run("validate", "--ckpt_path", last, "--data.corpus", "reversed.txt", "--data.split", "[0.8, 0.2, 0.0]")
    assert "trained on" not in capsys.readouterr().out
    half = "50 % of this val split is text that its weights were trained on."
    laboratory.run("validate", "--ckpt_path", last, "--data.split", "[0.8, 0.2, 0.0]")
    assert half in capsys.readouterr().out
    second = laboratory.fit("--model.warm_start", last, "--data.split", "[0.4, 0.5, 0.1]")
    assert "100 % of this val split" in capsys.readouterr().out
    laboratory.run("test", "--ckpt_path", second / "checkpoints/last.ckpt", "--data.split", "[0.4, 0.4, 0.2]")
    assert half.replace("val", "test") in capsys.readouterr().out


def test_a_loss_that_chose_its_weights_is_told_from_one_that_did_not(laboratory, capsys):
    folder = laboratory.fit()
    chosen = "chosen for the lowest loss on a val split"
    laboratory.run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert chosen not in capsys.readouterr().out
    laboratory.run("validate", "--ckpt_path", folder / "checkpoints/best.ckpt")
    assert chosen in capsys.readouterr().out


def test_a_loss_of_a_part_of_the_split_says_so(laboratory, capsys):
    last = laboratory.fit() / "checkpoints/last.ckpt"
    laboratory.run("validate", "--ckpt_path", last)
    assert "was measured" not in capsys.readouterr().out
    laboratory.fit("--trainer.limit_val_batches", 1)
    part = capsys.readouterr().out
    assert re.search(r"Only [\d.]+ % of this val split was measured", part)
    laboratory.run("validate", "--ckpt_path", last, "--trainer.limit_val_batches", 1)
    assert "% of this val split was measured" in capsys.readouterr().out
    laboratory.run("test", "--ckpt_path", last, "--data.split", "[0.4, 0.3, 0.3]", "--trainer.limit_test_batches", 1)
    assert "% of this test split was measured" in capsys.readouterr().out
    assert "trainer.limit_val_batches: no batch" in laboratory.refusal(
        capsys, "validate", "--ckpt_path", last, "--trainer.limit_val_batches", 0
    )


def test_a_loss_by_bytes_is_said_to_be_one(laboratory, capsys):
    Path("corpus.txt").write_text(TEXT.replace("e", "é"), encoding="utf-8")
    laboratory.fit("--data.tokenizer", "byte", "--model.sampling.max_new_tokens", 4)
    assert " nats per byte, " in capsys.readouterr().out


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in ("fit", "validate", "predict", "audit", "describe", "sweep", "compare"))


def test_the_same_objects_serve_in_a_notebook(laboratory):
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
    laboratory.run("predict", "--ckpt_path", "notebook.ckpt", "--data.prompts", "fox")
