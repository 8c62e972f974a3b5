"""Every YAML in configs/ as a user runs it, on a corpus with as many distinct characters as Tiny Shakespeare."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import yaml

from llmx.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
PARAMETERS = {"transformer": 803_712, "seed/transformer": 1_112_781, "seed/differential": 1_113_421}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "cache"))
    alphabet = np.array(list(string.ascii_letters + string.digits + " .\n"))
    assert len(alphabet) == 65
    draws = np.random.default_rng(0).integers(len(alphabet), size=3000)
    Path("corpus.txt").write_text("".join(alphabet) + "".join(alphabet[draws]))
    return "corpus.txt"


@pytest.mark.parametrize("name", NAMES)
def test_a_config_trains_and_only_the_founding_ones_leak(corpus, name):
    arguments = ["--data.corpus", corpus, "--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *arguments, "--trainer.limit_val_batches", "2"]) == 0
    record = json.loads(Path("lightning_logs/version_0/run.json").read_text())
    assert record["leaking"] == name.startswith("seed/")
    if name in PARAMETERS:
        assert record["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("seed/")])
def test_the_audit_names_the_norm_of_the_founding_networks(corpus, capsys, name):
    assert main(["audit", "--config", str(CONFIGS / f"{name}.yaml"), "--data.corpus", corpus]) == 1
    report = " ".join(capsys.readouterr().out.split())
    assert "blocks.0.norm (FoundingNorm)" in report
    error = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--data.corpus", corpus, "--model.audit", "error"]
    assert main(error) == 2
    assert "blocks.0.norm (FoundingNorm)" in " ".join(capsys.readouterr().err.split())
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_its_command(name):
    assert f"python main.py fit --config configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def test_the_founding_protocol_is_one_epoch_and_shared_by_all_three():
    configs = [yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) for name in PARAMETERS]
    for config in configs:
        assert config["trainer"]["max_steps"] == 15_685
        assert (config["data"]["window"], config["data"]["batch_size"]) == (32, 64)
    seeds = [config for name, config in zip(PARAMETERS, configs, strict=True) if name.startswith("seed/")]
    assert all("offline_corpus" not in config["data"] for config in seeds)
