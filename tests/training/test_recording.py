"""What a run's folder says of a run that is continued, or begins with weights: `compare` has nothing else to go by."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging

from llmx import Decoder, LanguageModel, RunLogger, TextDataModule, run_callbacks
from llmx.blocks.prenorm import PreNormBlock
from llmx.cli import main
from llmx.comparison.groups import find_runs, grouped
from llmx.comparison.ranking import compare
from llmx.comparison.table import caption
from llmx.errors import UserError
from llmx.feedforward.swiglu import SwiGLU
from llmx.mixers.attention import Attention
from llmx.runs.provenance import code, file_hash
from testbed.tiny import TEXT
from tests.laboratory import metrics_of, newest_run, record_of

MINE = """
from llmx.mixers.attention import Attention

class Mine(Attention):
    pass
"""
BREAKS = """
from lightning.pytorch.callbacks import Callback

class Breaks(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 6:
            raise RuntimeError("power cut")
"""


@pytest.fixture
def laboratory(laboratory, monkeypatch):
    monkeypatch.syspath_prepend(str(laboratory.folder))
    monkeypatch.setattr(sys, "orig_argv", ["python", "main.py"])  # names of runs come from it
    trainer = {"val_check_interval": 2, "accelerator": "cpu"}
    laboratory.configure(trainer=trainer, model={"sampling": {"max_new_tokens": 4}})
    laboratory.write_corpus(TEXT[::-1], "other.txt")
    return laboratory


def go_on(*arguments):
    return main(["fit", "--ckpt_path", "last", *(str(argument) for argument in arguments)])


def kept(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("corpus", "other.txt"),
        ("split", "[0.8, 0.2, 0.0]"),
        ("window", 4),
        ("batch_size", 8),
        ("val_stride", 4),
        ("sampling", "random"),
    ],
)
def test_a_run_does_not_go_on_with_other_data_than_it_began_with(laboratory, capsys, key, value):
    folder = laboratory.fit()
    before = kept(folder)
    capsys.readouterr()
    assert go_on("--trainer.max_steps", 4, f"--data.{key}", value) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: data.{key}: lightning_logs/version_0 began with ")
    assert error.count("\n") == 1
    assert kept(folder) == before


def test_a_damaged_record_is_named(laboratory, capsys):
    folder = laboratory.fit()
    for content in ("{", "[]", '{"continued": {"x": {}}}', '{"data": 5}'):
        (folder / "run.json").write_text(content)
        capsys.readouterr()
        assert go_on("--trainer.max_steps", 4) == 2
        assert "version_0/run.json: is damaged" in capsys.readouterr().err


def test_the_same_text_may_lie_elsewhere_and_a_plain_continuation_is_no_other_run(laboratory):
    whole = laboratory.fit("--trainer.max_steps", 8)
    Path("breaks.py").write_text(BREAKS)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["fit", "--config", "tiny.yaml", "--trainer.max_steps", "8", "--trainer.callbacks", "breaks.Breaks"])
    folder = newest_run()
    (folder / "config.yaml").write_text((whole / "config.yaml").read_text())
    record = record_of(folder)
    (folder / "run.json").write_text(json.dumps(record | {"sources": {}}))
    assert go_on() == 0
    assert record_of(folder)["continued"] == {}
    Path("moved.txt").write_text(TEXT)
    assert go_on("--trainer.max_steps", 10, "--data.corpus", "moved.txt") == 0
    assert metrics_of(folder)["tokens"] == 10 * 4 * 8


def test_a_run_that_is_continued_with_other_settings_is_shown_apart(laboratory):
    laboratory.fit("--seed_everything", 1, "--trainer.max_steps", 4)
    laboratory.fit("--seed_everything", 2)
    assert go_on("--trainer.max_steps", 4) == 0
    assert go_on("--trainer.max_steps", 4) == 0  # nothing is left to do
    laboratory.fit("--seed_everything", 4, "--trainer.max_steps", 4)
    names = [(group.name, len(group.runs)) for group in grouped(find_runs(["lightning_logs"]))]
    assert names == [
        ("Decoder (max_steps=4)", 2),
        ("Decoder (from step 2 max_steps=4, max_steps=2)", 1),
    ]


def test_where_a_run_went_on_from_an_earlier_step_what_came_after_it_is_forgotten(laboratory):
    folder = laboratory.fit()
    shutil.copytree(folder / "checkpoints", "early", symlinks=True)
    assert go_on("--trainer.max_steps", 6, "--model.optimizer.lr", 0.5) == 0
    assert list(record_of(folder)["continued"]) == ["2"]
    shutil.rmtree(folder / "checkpoints")
    shutil.move("early", folder / "checkpoints")
    assert go_on("--trainer.max_steps", 4, "--trainer.precision", "bf16-mixed") == 0
    continued = record_of(folder)["continued"]
    assert [(step, leg["precision"]) for step, leg in continued.items()] == [("2", "bf16-mixed")]


def test_a_continued_run_has_not_ended_until_it_has(laboratory, capsys):
    folder = laboratory.fit("--trainer.max_steps", 4)
    Path("breaks.py").write_text(BREAKS)
    with pytest.raises(RuntimeError, match="power cut"):
        go_on("--trainer.max_steps", 8, "--trainer.callbacks", "breaks.Breaks")
    with pytest.raises(UserError, match=r"it has no metrics\.json"):
        find_runs([str(folder)])
    assert go_on("--trainer.max_steps", 8, "--trainer.callbacks", "null") == 0
    (run,) = find_runs([str(folder)])
    assert run.losses.mean() == pytest.approx(run.loss, abs=1e-5)
    assert run.seconds is None


def test_what_a_run_was_warm_started_from_is_compared(laboratory):
    first = laboratory.fit("--trainer.max_steps", 4)
    checkpoint = first / "checkpoints/last.ckpt"
    warm = laboratory.fit("--model.warm_start", checkpoint, "--trainer.max_steps", 4)
    groups = grouped(find_runs(["lightning_logs"]))
    with pytest.raises(UserError, match=rf"warm start is none in .*, {checkpoint} \(sha256 [0-9a-f]{{12}}\) in"):
        compare(groups)
    # another file under the same name
    Path(checkpoint).unlink()
    shutil.copy(newest_run() / "checkpoints/last.ckpt", checkpoint)
    laboratory.fit("--model.warm_start", checkpoint, "--trainer.max_steps", 4, "--seed_everything", 5)
    assert len(grouped(find_runs([str(warm), str(newest_run())]))) == 2
    # of a version that did not keep it
    record = record_of(warm)
    del record["warm_start"]
    (warm / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="warm start is none in"):
        compare(grouped(find_runs([str(first), str(warm)])))


def test_seeds_of_other_averaging_precision_or_sources_are_no_seeds_of_one_network(laboratory, monkeypatch):
    Path("mine.py").write_text(MINE)
    mine = ["--model.network.init_args.block.init_args.mixer", '{"class_path": "mine.Mine", "init_args": {"heads": 2}}']
    laboratory.fit("--seed_everything", 1, *mine)
    laboratory.fit("--seed_everything", 2, *mine, "--trainer.callbacks+=NormsByLayer")  # looks on
    assert [len(group.runs) for group in grouped(find_runs(["lightning_logs"]))] == [2]
    Path("mine.py").write_text(MINE + "    # another\n")
    laboratory.fit("--seed_everything", 3, *mine)
    laboratory.fit("--seed_everything", 4, *mine, "--trainer.precision", "bf16-mixed")
    laboratory.fit("--seed_everything", 5, *mine, "--trainer.callbacks+=EMAWeightAveraging")
    groups = grouped(find_runs(["lightning_logs"]))
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2], [3], [4], [5]]
    assert len({group.name for group in groups}) == 4
    assert "source of mine=" in groups[1].name
    assert "precision=bf16-mixed" in groups[2].name


def test_what_a_file_of_ones_own_imports_is_part_of_it(laboratory, monkeypatch):
    Path("halves.py").write_text("def half(x):\n    return x / 2\n")
    Path("halved.py").write_text("from halves import half\n" + MINE)  # modules that no other test imports
    mixer = '{"class_path": "halved.Mine", "init_args": {"heads": 2}}'
    mine = ["--model.network.init_args.block.init_args.mixer", mixer]
    first = laboratory.fit("--seed_everything", 1, *mine)
    kept = record_of(first)["sources"]
    assert kept == {name: file_hash(f"{name}.py") for name in ("halved", "halves")}
    Path("halves.py").write_text("def half(x):\n    return x / 3\n")
    laboratory.fit("--seed_everything", 2, *mine)
    assert ["source of halves=" in group.name for group in grouped(find_runs(["lightning_logs"]))] == [True, True]


def test_rows_of_other_states_of_llmx_are_told_apart_below_the_table(laboratory, monkeypatch):
    laboratory.fit("--seed_everything", 1)
    laboratory.fit("--seed_everything", 2)
    assert "sources of llmx" not in caption(compare(grouped(find_runs(["lightning_logs"]))))
    monkeypatch.setattr("llmx.training.recording.code", lambda: "0123456789")
    laboratory.fit("--seed_everything", 3)
    own = code()[:8]
    said = caption(compare(grouped(find_runs(["lightning_logs"]))))
    assert "same sources of llmx (run.json: code): " in said
    assert "01234567: Decoder" in said
    assert f"{own}: Decoder" in said


def fit_in_a_notebook(seed, warm_start=None, **trainer):
    seed_everything(seed, verbose=False)
    data = TextDataModule(corpus="corpus.txt", window=8, batch_size=4)
    block = partial(PreNormBlock, mixer=partial(Attention, heads=2), feed_forward=partial(SwiGLU, hidden=8))
    decoder = partial(Decoder, dim=8, depth=1, block=block)
    model = LanguageModel(decoder, data.tokenizer, data.window, warm_start=warm_start)
    logger, callbacks = RunLogger(".", "lightning_logs"), [*run_callbacks(), *trainer.pop("callbacks", [])]
    settings = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False} | trainer
    Trainer(**settings, logger=logger, callbacks=callbacks).fit(model, datamodule=data)
    return newest_run()


def test_runs_of_a_notebook_are_compared_and_continued_like_others(laboratory):
    first = fit_in_a_notebook(1)
    fit_in_a_notebook(2)
    fit_in_a_notebook(3, gradient_clip_val=0.5)
    fit_in_a_notebook(4, callbacks=[EMAWeightAveraging()])
    groups = grouped(find_runs(["lightning_logs"]))
    assert [[run.seed for run in group.runs] for group in groups] == [[1, 2], [3], [4]]
    assert groups[1].name == "Decoder (gradient_clip_val=0.5)"
    assert "callbacks.0.class_path=lightning.pytorch.callbacks.EMAWeightAveraging" in groups[2].name
    fit_in_a_notebook(5, first / "checkpoints/last.ckpt")
    with pytest.raises(UserError, match=rf"warm start is none in .*, {first}/checkpoints/last.ckpt \(sha256"):
        compare(grouped(find_runs(["lightning_logs"])))
    checkpoint = str(first / "checkpoints/last.ckpt")
    assert main(["fit", "--ckpt_path", checkpoint, "--trainer.max_steps", "4"]) == 0
    assert metrics_of(first)["step"] == 4
    assert list(record_of(first)["continued"]) == ["2"]


def test_a_run_of_a_version_that_kept_less_is_read(laboratory):
    folder = laboratory.fit()
    record = record_of(folder)
    for key in ("sources", "warm_start", "continued", "audit", "leaking", "precision", "code"):
        record.pop(key, None)
    (folder / "run.json").write_text(json.dumps(record))
    (group,) = grouped(find_runs([str(folder)]))
    assert group.unaudited
    assert np.isfinite(group.values).all()
    assert go_on("--trainer.max_steps", 4) == 0
    (group,) = grouped(find_runs([str(folder)]))
    assert not group.unaudited


def test_a_new_run_records_how_much_validation_text_stands_in_the_training_text(laboratory, capsys, monkeypatch):
    words = np.random.default_rng(0).integers(97, 123, size=4000).astype(np.uint8).tobytes().decode()
    laboratory.write_corpus(words)
    assert record_of(laboratory.fit())["val_text_in_train"] == 0.0
    assert "word for word" not in capsys.readouterr().out
    laboratory.write_corpus(words[:3800] + words[500:560] + words[3860:])
    run = laboratory.fit()
    assert record_of(run)["val_text_in_train"] == 60 / 400
    assert "15 % of the validation split stands in the training split word for word" in capsys.readouterr().out
    monkeypatch.setattr(TextDataModule, "share_repeated", None)  # a resumed run does not ask
    assert go_on("--trainer.max_steps", 4) == 0
    assert record_of(run)["val_text_in_train"] == 60 / 400
