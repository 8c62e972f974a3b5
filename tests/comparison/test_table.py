"""Groups, refusals and the table, on run folders written by hand; and the verb on runs that were trained."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from llmx.cli import main
from llmx.comparison.groups import find_runs, grouped
from llmx.comparison.ranking import compare
from llmx.errors import UserError

CHARACTERS = 10_000  # enough for an interval over them


def make_run(folder, config="configs/llama.yaml", seed=1, loss=1.5, **changes):
    """The folder of a finished run; changes: command, lr, window, tokens, characters, leaking, parameters, flops, and
    whole settings, record, metrics and data that are put over what there is."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    settings = {
        "seed_everything": seed,
        "trainer": {"max_steps": 10, "default_root_dir": str(folder)},
        "model": {"network": {"class_path": "Decoder"}, "optimizer": {"init_args": {"lr": changes.get("lr", 3e-3)}}},
        "data": {"corpus": "gone.txt"},
    }
    settings |= changes.get("settings", {})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    data = {"corpus": "small", "sha256": "ab", "split": [0.9, 0.1, 0], "vocab_size": 65, "val_stride": None}
    data |= {"val_count": "new", "window": changes.get("window", 8)} | changes.get("data", {})
    parameters = changes.get("parameters", 1000)
    flops = changes.get("flops", 6000)
    network = {"groups": {"mixers": {"parameters": parameters}}, "state_bytes": 64, "training_flops_per_token": flops}
    record = {
        "command": changes.get("command", ["main.py", "fit", "--config", config]),
        "data": data,
        "parameters": parameters,
        "audit": {"leaking": False},
    }
    record |= {"network": network} | changes.get("record", {})
    (folder / "run.json").write_text(json.dumps(record))
    metrics = {"val/loss": loss, "step": 10, "seconds": 4.0, "leaking": changes.get("leaking", False)}
    metrics |= {"tokens": changes.get("tokens", 640), "peak_bytes": 5, "generated_tokens_per_second": 9.0}
    metrics |= {"steps_in_these_seconds": 10} | changes.get("metrics", {})
    (folder / "metrics.json").write_text(json.dumps(metrics))
    noise = np.random.default_rng(seed).normal(0, 0.1, CHARACTERS)
    hard = np.random.default_rng(99).exponential(1, CHARACTERS)
    losses = (hard + noise)[: changes.get("characters")]
    np.save(folder / "val_losses.npy", (losses - losses.mean() + loss).astype(np.float32))
    with SummaryWriter(str(folder)) as board:
        for step in (4, 9):
            board.add_scalar("val/loss", loss + (9 - step) / 10, step)
        board.add_scalar("train/tokens_per_second", 100.0, 5)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def groups_of(*patterns):
    return grouped(find_runs(patterns or ["lightning_logs"]))


def test_runs_that_differ_in_the_seed_alone_are_one_group(here):
    for seed, loss in ((1, 1.5), (2, 1.6), (3, 1.7)):
        make_run(f"lightning_logs/version_{seed}", seed=seed, loss=loss)
    make_run("lightning_logs/version_10", config="configs/gru.yaml", seed=1)
    groups = groups_of()
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [("llama", [1, 2, 3]), ("gru", [1])]
    assert groups[0].values.tolist() == [1.5, 1.6, 1.7]


def test_groups_of_one_name_say_what_tells_them_apart(here):
    make_run("lightning_logs/version_0", lr=0.001)
    make_run("lightning_logs/version_1", lr=0.003)
    assert [group.name for group in groups_of()] == ["llama (optimizer.lr=0.001)", "llama (optimizer.lr=0.003)"]


def test_equal_settings_under_unequal_protocols_are_neither_one_group_nor_ranked(here, capsys):
    """Another text under the same path, and a run that went on to other steps."""
    make_run("lightning_logs/version_0", data={"sha256": "ab" * 32})
    make_run("lightning_logs/version_1", data={"sha256": "cd" * 32})
    make_run("lightning_logs/version_2", config="configs/gru.yaml", data={"sha256": "cd" * 32})
    names = [group.name for group in groups_of()]
    assert names == ["llama (sha256=abababababab)", "llama (sha256=cdcdcdcdcdcd)", "gru"]
    with pytest.raises(UserError, match=r"sha256 is (ab){32} in llama \(sha256=(ab){6}\), (cd){32} in llama"):
        compare(groups_of())
    make_run("others/version_0")
    make_run("others/version_1", tokens=1280)
    with pytest.raises(UserError, match=r"tokens seen is 640 in llama \(tokens seen=640\), 1,280 in llama \(tok"):
        compare(groups_of("others"))
    assert main(["compare", "others", "--unranked"]) == 0
    rows = json.loads(Path("comparison/comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["llama (tokens seen=640)", "llama (tokens seen=1280)"]


def test_groups_that_nothing_shown_tells_apart_still_have_names_of_their_own(here):
    """A version that knew a setting as null, and one that did not know it."""
    make_run("lightning_logs/version_0")
    make_run("lightning_logs/version_1", settings={"vocab_size": None})
    names = [group.name for group in groups_of()]
    assert names == ["llama (run=lightning_logs/version_0)", "llama (run=lightning_logs/version_1)"]


def test_a_run_of_several_configs_has_the_names_of_those_that_are_files(here):
    added = ["--config", "configs/ingredients/muon.yaml"]
    plain = ["main.py", "fit", "--config", "/some/configs/lstm.yaml", "--config", "{}"]
    make_run("lightning_logs/a", loss=1.5, command=plain)
    make_run("lightning_logs/b", loss=1.4, command=[*plain, *added])
    make_run("lightning_logs/e", loss=1.1, command=["main.py", False, "fit", "--config=configs/gru.yaml"])  # damaged
    make_run("lightning_logs/c", loss=1.3, command=["main.py", "fit", "-c", "{model: {audit: warn}}"])
    make_run("lightning_logs/d", loss=1.2, command=["main.py", "fit", "-c", "mine"])
    assert {group.name for group in groups_of()} == {"lstm", "lstm + ingredients/muon", "Decoder", "mine", "gru"}


def test_runs_are_found_by_folder_glob_and_root_and_each_once(here):
    for number in (2, 10):
        make_run(f"lightning_logs/version_{number}", seed=number)
    assert [run.seed for run in find_runs(["lightning_logs", "lightning_logs/version_*"])] == [2, 10]
    assert [run.seed for run in find_runs(["lightning_logs/version_10"])] == [10]


@pytest.mark.parametrize("missing", ["metrics.json", "run.json", "config.yaml", "val_losses.npy"])
def test_what_a_run_lacks_is_said(here, missing):
    folder = make_run("lightning_logs/version_0")
    (folder / missing).unlink()
    with pytest.raises(UserError, match=re.escape(missing)):
        find_runs(["lightning_logs/version_0"])


def test_a_pattern_that_finds_nothing_is_named(here):
    with pytest.raises(UserError, match="nowhere"):
        find_runs(["nowhere/version_*"])


def test_the_best_is_first_and_the_baseline_is_named(here):
    for seed in (1, 2):
        make_run(f"lightning_logs/version_{seed}", seed=seed, loss=1.6 + seed / 1000)
        make_run(f"lightning_logs/version_{seed + 2}", config="configs/gru.yaml", seed=seed, loss=1.5 + seed / 1000)
    comparison = compare(groups_of())
    assert [(row.rank, row.name) for row in comparison.rows] == [(1, "gru"), (2, "llama")]
    assert comparison.baseline == "llama"
    best = comparison.rows[0]
    assert best.difference.value == pytest.approx(-0.1)
    assert (best.difference.basis, best.loss.basis) == ("pairs", "seeds")
    assert best.adjusted_p == best.difference.p < 0.001
    assert comparison.rows[1].difference is None
    other = compare(groups_of(), baseline="gru").rows[1]
    assert other.difference.value == pytest.approx(0.1)
    with pytest.raises(UserError, match=r"baseline: there is no 'gpt9' among llama, gru"):
        compare(groups_of(), baseline="gpt9")


def test_a_difference_is_paired_where_the_seeds_are_the_same(here, capsys):
    """Seeds that move both networks by 0.03 and differ in what they do to one by 0.001."""
    for seed, (moved, own) in enumerate([(0.03, 0.001), (-0.03, 0), (0, -0.001)]):
        make_run(f"lightning_logs/version_{seed}", seed=seed, loss=1.6 + moved)
        make_run(f"lightning_logs/version_{seed + 3}", config="configs/gru.yaml", seed=seed, loss=1.59 + moved + own)
        make_run(f"others/version_{seed}", config="configs/gru.yaml", seed=seed + 1, loss=1.59 + moved + own)
    pairs = compare(groups_of("lightning_logs"), baseline="llama").rows[0].difference
    others = compare(groups_of("lightning_logs/version_[012]", "others"), baseline="llama").rows[0].difference
    assert (pairs.basis, others.basis) == ("pairs", "seeds")
    assert pairs.value == pytest.approx(others.value)
    assert pairs.high < 0 < others.high
    assert main(["compare", "lightning_logs"]) == 0
    assert "runs of the same seed" in " ".join(capsys.readouterr().out.split())


def test_with_one_seed_the_interval_is_over_the_text_and_says_so(here, capsys):
    make_run("lightning_logs/version_1", loss=1.6)
    make_run("lightning_logs/version_2", config="configs/gru.yaml", seed=2, loss=1.5)
    comparison = compare(groups_of())
    assert {row.loss.basis for row in comparison.rows} == {"text"}
    assert comparison.rows[0].difference.basis == "text"
    assert main(["compare", "lightning_logs"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "it says nothing about seeds" in said
    assert f"characters validated {len(groups_of()[0].losses):,}" in said


def test_few_characters_have_no_interval_and_no_small_p(here, capsys):
    """Of one block each draw is the same: an interval of no width."""
    make_run("lightning_logs/version_1", characters=300)
    make_run("lightning_logs/version_2", config="configs/gru.yaml", characters=300, loss=1.4)
    assert main(["compare", "lightning_logs"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"1 gru 1\.4000\* -0\.1000\* 1\.000 ", said)
    assert "fewer than 10,000 characters were validated" in said
    best = json.loads(Path("comparison/comparison.json").read_text())["rows"][0]
    assert best["loss"] == {"value": best["loss"]["value"], "low": None, "high": None, "basis": "text", "p": None}
    assert "-0.1000</td><td>*</td>" in Path("comparison/report.html").read_text()


def test_settings_unlike_those_of_the_baseline_are_listed_whatever_the_row_is_called(here, capsys):
    """An idea that also has another number of heads, and another learning rate."""
    heads = lambda mixer, heads: {"class_path": f"llmx.{mixer}", "init_args": {"heads": heads}}  # noqa: E731
    idea = {"class_path": "Decoder", "init_args": {"mixer": heads("Attention", 8), "norms": ["A", "B"]}}
    plain = {"class_path": "Decoder", "init_args": {"mixer": heads("Attention", 4), "norms": ["A", "C"], "tied": None}}
    other = {"class_path": "Decoder", "init_args": {"mixer": heads("LSTM", 4), "norms": ["A"]}}
    for name, network, lr in (("llama", plain, 0.003), ("idea", idea, 0.003), ("<lstm>", other, 0.009)):
        settings = {"model": {"network": network, "optimizer": {"init_args": {"lr": lr}}}}
        make_run(f"lightning_logs/{name[1:]}", config=f"configs/{name}.yaml", settings=settings)
    assert main(["compare", "lightning_logs", "--baseline", "llama"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "idea network.mixer.heads 8 (4), network.norms.1 B (C)" in said
    assert "<lstm> network.mixer LSTM (Attention), network.norms" in said
    assert "optimizer.lr 0.009 (0.003)" in said
    rows = {row["name"]: row["unlike"] for row in json.loads(Path("comparison/comparison.json").read_text())["rows"]}
    assert rows["llama"] == {}
    assert rows["<lstm>"]["model.network.init_args.mixer"] == [heads("Attention", 4), heads("LSTM", 4)]
    page = Path("comparison/report.html").read_text()
    assert "<td>idea</td><td>network.mixer.heads 8 (4), network.norms.1 B (C)</td>" in page
    assert "<td>&lt;lstm&gt;</td><td>network.mixer LSTM (Attention)" in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 16}, "window is 8 in llama, 16 in gru"),
        ({"tokens": 6400}, "tokens seen is 640 in llama, 6,400 in gru"),
        ({"characters": 300}, "characters validated is 10,000 in llama, 300 in gru"),
    ],
)
def test_unequal_protocols_are_not_ranked(here, capsys, change, said):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/gru.yaml", **change)
    assert main(["compare", "lightning_logs"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "--unranked" in error
    assert not Path("comparison").exists()
    assert main(["compare", "lightning_logs", "--unranked"]) == 0
    assert "NOT RANKED" in capsys.readouterr().out
    rows = json.loads(Path("comparison/comparison.json").read_text())["rows"]
    assert [(row["name"], row["rank"], row["difference"]) for row in rows] == [
        ("llama", None, None),
        ("gru", None, None),
    ]


def test_at_equal_flops_the_tokens_seen_may_differ_but_not_the_flops(here, capsys):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/gru.yaml", loss=1.4, tokens=1280, flops=3000)
    assert main(["compare", "lightning_logs", "--at-equal", "flops"]) == 0
    comparison = json.loads(Path("comparison/comparison.json").read_text())
    assert [(row["name"], row["rank"]) for row in comparison["rows"]] == [("gru", 1), ("llama", 2)]
    assert "tokens seen" not in comparison["protocol"] | comparison["differing"]
    make_run("lightning_logs/version_3", config="configs/lstm.yaml", tokens=1280)
    assert main(["compare", "lightning_logs", "--at-equal", "flops", "--out", "second"]) == 2
    assert "at-equal: flops are up to 2.00 times apart" in capsys.readouterr().err
    assert not Path("second").exists()


def test_a_network_that_counts_compares_whatever_others_have_seen(here):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/ngram.yaml", tokens=None, flops=None)
    assert not compare(groups_of()).differing


def test_a_leak_has_no_rank_and_is_last_however_low_its_loss(here, capsys):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/seed/transformer.yaml", loss=1.02, leaking=True)
    rows = compare(groups_of()).rows
    assert [(row.name, row.rank, row.leaking) for row in rows] == [
        ("llama", 1, False),
        ("seed/transformer", None, True),
    ]
    assert main(["compare", "lightning_logs"]) == 0
    assert "LEAKING" in capsys.readouterr().out
    assert "LEAKING" in Path("comparison/report.html").read_text()


def test_what_nobody_audited_has_no_rank_and_says_so(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    make_run("lightning_logs/version_1", loss=1.6)
    make_run("lightning_logs/version_2", config="configs/gru.yaml", loss=1.4, record={"audit": None})
    make_run("lightning_logs/version_3", config="configs/lstm.yaml", loss=1.02, leaking=True)
    rows = compare(groups_of()).rows
    assert [(row.name, row.rank, row.unaudited) for row in rows] == [
        ("llama", 1, False),
        ("gru", None, True),
        ("lstm", None, False),
    ]
    assert main(["compare", "lightning_logs"]) == 0
    assert "gru UNAUDITED" in capsys.readouterr().out
    assert "UNAUDITED" in Path("comparison/report.html").read_text()


def test_either_file_is_believed_that_says_leaking(here):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/gru.yaml", record={"leaking": True})
    assert [(row.name, row.rank) for row in compare(groups_of()).rows] == [("llama", 1), ("gru", None)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": float("nan")}, "metrics.json: val/loss is nan"),
        ({"metrics": {"val/loss": 1.2}}, "val/loss of metrics.json is 1.2000, and val_losses.npy is of a validation"),
        ({"record": {"audit": "passed"}}, "run.json: audit is missing or damaged"),
        ({"record": {"network": {"groups": [1]}}}, "run.json: network.groups"),
        ({"record": {"continued": {"4": {"config": None}}}}, "run.json: continued.*.config"),
    ],
)
def test_numbers_that_contradict_themselves_are_refused(here, change, said):
    make_run("lightning_logs/version_1", **change)
    with pytest.raises(UserError, match=re.escape(said)):
        groups_of()


def test_one_seed_counts_once(here, capsys):
    """Two runs of it would be an interval of 0. Without a seed two runs are two draws, but not two copies."""
    for number in (1, 2):
        make_run(f"seeded/version_{number}", seed=0, loss=1.5 + number / 100)
        make_run(f"copied/version_{number}", seed=1, settings={"seed_everything": False})
        make_run(f"drawn/version_{number}", seed=number, settings={"seed_everything": False})
    assert main(["compare", "seeded"]) == 2
    assert "seeded/version_1 and seeded/version_2 are one configuration with one seed (0)" in capsys.readouterr().err
    with pytest.raises(UserError, match="copied/version_1 and copied/version_2"):
        groups_of("copied")
    assert [len(group.runs) for group in groups_of("drawn")] == [2]


@pytest.mark.parametrize(
    ("at", "change", "said"),
    [
        ("flops", {"flops": None}, "flops are unknown: nobody has counted those of lightning_logs/version_2"),
        ("seconds", {"metrics": {"steps_in_these_seconds": 3}}, "version_2 was stopped and continued"),
    ],
)
def test_at_equal_refuses_what_is_not_known(here, capsys, at, change, said):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/gru.yaml", **change)
    assert main(["compare", "lightning_logs", "--at-equal", at]) == 2
    assert said in capsys.readouterr().err
    if at == "seconds":  # nor is it said that they are equal
        assert "wall-clock" not in compare(groups_of()).matching


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "equal parameters (within 0.0 %), equal training FLOPs (within 0.0 %), equal wall-clock (within 0.0 %)"),
        ({"parameters": 1040}, "equal parameters (within 4.0 %)"),
        ({"parameters": 1100}, "parameters up to 1.10 times apart"),
        ({"flops": 12000}, "training FLOPs up to 2.00 times apart"),
    ],
)
def test_the_table_says_which_matching_holds(here, change, said):
    make_run("lightning_logs/version_1")
    make_run("lightning_logs/version_2", config="configs/gru.yaml", **change)
    assert said in compare(groups_of()).matching


def test_csv_json_figures_and_report_are_written_and_agree(here, capsys):
    make_run("lightning_logs/version_1", loss=1.6)
    make_run("lightning_logs/version_2", config="configs/<b>gru.yaml", loss=1.5)
    assert main(["compare", "lightning_logs", "--out", "mine", "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(Path("mine/comparison.json").read_text())
    lines = list(csv.DictReader(Path("mine/comparison.csv").read_text().splitlines()))
    assert (
        [float(line["loss_value"]) for line in lines] == [row["loss"]["value"] for row in printed["rows"]] == [1.5, 1.6]
    )
    assert lines[1]["difference_value"] == ""
    assert {path.name for path in Path("mine").glob("*.png")} == {"loss.png", "curves.png", "position.png"}
    page = Path("mine/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;b&gt;gru" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing from elsewhere


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "runs"),
        (["nowhere"], "nowhere"),
        (["lightning_logs", "--format", "xml"], "format"),
        (["lightning_logs", "--baseline", "x"], "baseline"),
    ],
)
def test_bad_input_is_one_message(here, capsys, arguments, said):
    make_run("lightning_logs/version_1")
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_runs_that_were_trained_compare(laboratory, monkeypatch):
    """From fit to report: the breakdown by kind needs the corpus, the costs what a fit keeps."""
    laboratory.write_corpus("ALL:\nthe quick brown fox, jumps.\n\n" * 60)
    laboratory.config["model"]["network"]["init_args"]["block"]["init_args"]["mixer"] = "GRU"
    laboratory.configure(trainer={"max_steps": 3})
    for seed in (1, 2):
        command = ["fit", "--config", "tiny.yaml", "--seed_everything", str(seed)]
        monkeypatch.setattr("sys.orig_argv", ["python", "main.py", *command])
        assert main(command) == 0
    assert main(["compare", "lightning_logs", "--out", "out"]) == 0
    (row,) = json.loads(Path("out/comparison.json").read_text())["rows"]
    assert row["name"] == "tiny"
    assert row["seeds"] == [1, 2]
    costs = [
        "training_flops",
        "tokens_per_second",
        "seconds",
        "peak_bytes",
        "state_bytes",
        "generated_tokens_per_second",
    ]
    assert all(row[cost] > 0 for cost in costs)
    assert sum(row["parameters_of"].values()) == row["parameters"]
    assert Path("out/kind.png").is_file()
