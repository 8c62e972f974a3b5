"""Every YAML in configs/ as a user runs it, on a corpus with as many distinct characters as Tiny Shakespeare."""

import json
import string
from pathlib import Path

import numpy as np
import pytest

from llmx import LanguageModel
from llmx.audits.equivalence import audit_equivalence
from llmx.audits.parameters import audit_parameters
from llmx.cli import main, parse
from llmx.config.base_files import read_config
from llmx.config.command import Command
from llmx.config.factories import build
from llmx.sweep.space import read_space
from llmx.training.callbacks import Samples
from llmx.training.optimizers import parameter_groups

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in CONFIGS.rglob("*.yaml")
    if "network" in (read_config(path).get("model") or {})
    and path.parent.name not in ("scale", "record", "ingredients")
)
VARIANTS = sorted(f"record/{path.stem}" for path in (CONFIGS / "record").glob("*.yaml"))
PARAMETERS = {"transformer": 803_712, "seed/transformer": 1_112_781, "seed/differential": 1_113_421}
RUNS = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES]  # a run, made once, serves them all
LEAKING = ("expert_choice", "seed/transformer", "seed/differential")


def corpus_text() -> str:
    alphabet = np.array(list(string.ascii_letters + string.digits + " .\n"))
    assert len(alphabet) == 65
    draws = np.random.default_rng(0).integers(len(alphabet), size=3000)
    return "".join(alphabet) + "".join(alphabet[draws])


@pytest.fixture
def corpus(laboratory):
    laboratory.write_corpus(corpus_text())
    return "corpus.txt"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A function from a config's name to the folder of a run of two steps, made once."""
    made: dict[str, Path] = {}

    def fit(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace("/", "-"))
            (folder / "corpus.txt").write_text(corpus_text())
            arguments = ["--data.corpus", str(folder / "corpus.txt"), "--trainer.default_root_dir", str(folder)]
            arguments += ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "2"]
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LLMX_CACHE", str(folder / "cache"))
                patch.setattr(Samples.__init__, "__defaults__", ("\n", 20))  # a tenth, for the sake of time
                quiet = ["--trainer.enable_progress_bar", "false"]
                assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *arguments, *quiet]) == 0
            made[name] = folder / "lightning_logs" / "version_0"
        return made[name]

    return fit


@pytest.mark.parametrize("name", RUNS)
def test_a_config_trains_and_only_those_that_are_meant_to_leak(run, name):
    record = json.loads((run(name) / "run.json").read_text())
    assert record["leaking"] == (name in LEAKING)
    if name in PARAMETERS:
        assert record["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("name", RUNS)
def test_a_config_passes_the_other_audits_and_generates_past_its_window(run, name):
    model = LanguageModel.load_from_checkpoint(run(name) / "checkpoints" / "last.ckpt", map_location="cpu")
    forms, parameters = audit_equivalence(model.network, 32), audit_parameters(model.network, 32)
    assert not forms.failing, forms.summary()
    assert not parameters.failing, parameters.summary()
    assert (forms.skipped is None) == (name not in LEAKING)  # all others of the collection have a recurrent form
    assert len(model.generate("a", max_new_tokens=40)) == 41


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("seed/")])
def test_the_audit_names_the_norm_of_the_founding_networks(corpus, capsys, name):
    assert main(["audit", "--config", str(CONFIGS / f"{name}.yaml"), "--data.corpus", corpus]) == 1
    report = " ".join(capsys.readouterr().out.split())
    assert "blocks.0.norm (FoundingNorm)" in report
    error = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--data.corpus", corpus, "--model.audit", "error"]
    assert main(error) == 2
    assert "blocks.0.norm (FoundingNorm)" in " ".join(capsys.readouterr().err.split())
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize("name", [*NAMES, *VARIANTS])
def test_a_config_says_its_command(name):
    assert f"python main.py fit --config configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("seed/") and n not in ("record", "fast")])
def test_a_config_shares_corpus_window_batch_and_validation(name):
    base, config = read_config(CONFIGS / "base.yaml"), read_config(CONFIGS / f"{name}.yaml")
    assert config["data"] == base["data"]
    assert config["seed_everything"] == base["seed_everything"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_the_record_is_as_large_trains_all_of_it_and_is_in_the_sweep(name):
    """Their components have tests of their own; a run of each would take a minute."""
    model = parse(Command.read(["fit", "--config", str(CONFIGS / f"{name}.yaml")])).model.as_dict()
    network = build(model["network"], 65, "model.network")
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(4_752_652, rel=0.002)
    optimizer = build(model["optimizer"], parameter_groups(network, "matrices"), "model.optimizer")
    assert {p for group in optimizer.param_groups for p in group["params"]} == set(network.parameters())
    space = read_space(str(CONFIGS / "sweeps" / "record.yaml")).dimensions["config"]
    # other batches have other numbers of steps, which a sweep cannot give them
    assert (f"configs/{name}.yaml" in space.values) == ("_batch_" not in name)


@pytest.mark.parametrize(
    ("name", "sweep"), [("lstm", "ingredients"), ("minlstm", "ingredients"), ("minlstm", "feed_forward")]
)
def test_an_ingredient_changes_a_network_of_the_collection_and_hardly_its_size(name, sweep):
    def configured(*configs):
        words = [word for config in configs for word in ("--config", str(config))]
        return {**parse(Command.read(["fit", *words])).as_dict(), "config": None}

    def size(config):
        return sum(p.numel() for p in build(config["model"]["network"], 65, "model.network").parameters())

    plain = configured(CONFIGS / f"{name}.yaml")
    for value in read_space(str(CONFIGS / "sweeps" / f"{sweep}.yaml")).dimensions["config"].values:
        config = configured(CONFIGS / f"{name}.yaml", value)
        assert (config == plain) == (value == "{}")
        assert size(config) == pytest.approx(size(plain), rel=0.001)


def test_the_founding_protocol_is_one_epoch_and_shared_by_all_three():
    configs = [read_config(CONFIGS / f"{name}.yaml") for name in PARAMETERS]
    for config in configs:
        assert config["trainer"]["max_steps"] == 15_685
        assert (config["data"]["window"], config["data"]["batch_size"]) == (32, 64)
        optimizer, schedule = (config["model"][key]["init_args"] for key in ("optimizer", "schedule"))
        assert (optimizer["lr"], optimizer["weight_decay"], optimizer.get("betas", [0.9, 0.999])) == (
            3e-3,
            0.01,
            [0.9, 0.999],
        )
        assert schedule.get("warmup_steps", 0) == 0
        assert schedule["minimum_ratio"] == pytest.approx(1 / 3)
    seeds = [config for name, config in zip(PARAMETERS, configs, strict=True) if name.startswith("seed/")]
    assert all("offline_corpus" not in config["data"] for config in seeds)
