"""Two finished runs that an earlier version of llmx wrote still load, validate, predict, resume and compare.

The expected values are what that version printed for these runs.
"""

import json
import shutil
from pathlib import Path

import pytest

from llmx import LanguageModel
from llmx.cli import main

RUNS = Path(__file__).parent / "fixtures" / "earlier_runs"
HYBRID, NGRAM = "lightning_logs/version_0", "lightning_logs/version_1"
LAST = "checkpoints/last.ckpt"
GREEDY = {HYBRID: "the oooutoutoooooooooooooout", NGRAM: "the with out all out all out"}
PARAMETERS = {HYBRID: 6556, NGRAM: 0}
RESUMED = 3.4543232917785645  # val/loss of the hybrid at step 9
CLOSE = 1e-4  # processors round fp32 sums differently

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    shutil.copytree(RUNS, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "cache"))


def metrics(run):
    return json.loads(Path(run, "metrics.json").read_text())


@pytest.mark.parametrize("run", [HYBRID, NGRAM])
def test_an_earlier_checkpoint_loads_with_its_network_and_tokenizer(run):
    model = LanguageModel.load_from_checkpoint(Path(run, LAST), map_location="cpu")
    assert sum(p.numel() for p in model.network.parameters()) == PARAMETERS[run]
    assert model.tokenizer.vocab_size == 36


@pytest.mark.parametrize("run", [HYBRID, NGRAM])
def test_validating_an_earlier_checkpoint_gives_its_recorded_loss(run, capsys):
    assert main(["validate", "--ckpt_path", f"{run}/{LAST}", *QUIET]) == 0
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[:2] == ["val", "loss"]
    assert float(words[2]) == pytest.approx(metrics(run)["val/loss"], abs=CLOSE)


@pytest.mark.parametrize("run", [HYBRID, NGRAM])
def test_an_earlier_checkpoint_predicts_the_text_that_it_predicted(run):
    greedy = ["--model.sampling.temperature", "0", "--model.sampling.max_new_tokens", "24"]
    assert main(["predict", "--ckpt_path", f"{run}/{LAST}", "--data.prompts", "the ", *greedy, *QUIET]) == 0
    (sample,) = Path(run, "predictions/0.jsonl").read_text().splitlines()
    assert json.loads(sample)["text"] == GREEDY[run]


def test_an_earlier_run_resumes_in_its_folder():
    assert main(["fit", "--ckpt_path", f"{HYBRID}/{LAST}", "--trainer.max_steps", "9", *QUIET]) == 0
    assert sorted(path.name for path in Path("lightning_logs").iterdir()) == ["version_0", "version_1"]
    assert Path(HYBRID, LAST).resolve().name == "step=9.ckpt"
    assert (metrics(HYBRID)["step"], metrics(HYBRID)["tokens"]) == (9, 9 * 8 * 16)
    assert metrics(HYBRID)["val/loss"] == pytest.approx(RESUMED, abs=CLOSE)


def test_earlier_runs_compare_as_they_did(capsys):
    assert main(["compare", "lightning_logs", "--unranked", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(Path("compare.json").read_text())
    for row, run in zip(found["rows"], (HYBRID, NGRAM), strict=True):
        assert row["loss"]["value"] == metrics(run)["val/loss"]
        assert row["seconds"] == metrics(run)["seconds"]
