"""The verb `sweep`, on runs of two steps: grids, samplers, several processes on one study, and one that is killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
import yaml

import llmx.sweep.study
from llmx.cli import main
from llmx.sweep.report import Report
from llmx.sweep.space import Range, Space, Values, flags, read_space

CHECKOUT = Path(__file__).parents[2]
RATE = "model.optimizer.init_args.lr"
HEADS = "model.network.block.mixer.init_args.heads"

HANG = """
import os, time
from lightning.pytorch.callbacks import Callback

class Hang(Callback):
    def on_train_batch_end(self, trainer, *_):
        if "HANG" in os.environ:
            open("hanging", "w").close()
            time.sleep(600)
"""


@pytest.fixture
def laboratory(laboratory, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    laboratory.write_corpus("".join(f"{i * i % 97:02d} the quick brown fox;\n" for i in range(60)))
    laboratory.configure(trainer={"enable_checkpointing": False, "limit_val_batches": 2})
    return laboratory


def write_space(space, **settings):
    Path("space.yaml").write_text(yaml.safe_dump({"space": space, **settings}, sort_keys=False))


def command(*arguments):
    return ["sweep", "--config", "tiny.yaml", *(str(argument) for argument in arguments)]


def sweep(capsys, *arguments):
    """What a sweep says in JSON."""
    capsys.readouterr()
    assert main(command(*arguments, "--format", "json")) == 0
    return json.loads(capsys.readouterr().out)


def fails(capsys, *arguments):
    assert main(command(*arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    return error[error.index("error: ") :]


def folders():
    return {str(path) for path in Path("lightning_logs").glob("version_*")}


def loss_of(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())["val/loss"]


def study(name="tiny-space"):
    return optuna.load_study(study_name=name, storage="sqlite:///lightning_logs/sweeps.db")


# --------------------------------------------------------------------------------------------------------------- runs
def test_a_space_of_configs_leaves_the_last_word_to_flags_and_its_runs_tell_their_own_command(laboratory, capsys):
    Path("wide.yaml").write_text("base: tiny.yaml\ntrainer: {max_steps: 9}\nmodel: {network: {init_args: {dim: 16}}}\n")
    inline = json.dumps({"model": {"network": {"init_args": {"dim": 24}}}})
    write_space({"config": {"values": ["wide.yaml", json.loads(inline)]}})
    result = sweep(capsys, "--sweep", "space.yaml", "--seeds", "2", "--trainer.max_steps", "1")
    assert len(result["trials"]) == 2
    for trial in result["trials"]:
        config = trial["parameters"]["config"]
        for run in trial["runs"]:
            held = yaml.safe_load((Path(run["folder"]) / "config.yaml").read_text())
            assert held["model"]["network"]["init_args"]["dim"] == (16 if config == "wide.yaml" else 24)
            assert json.loads((Path(run["folder"]) / "metrics.json").read_text())["step"] == 1
            words = json.loads((Path(run["folder"]) / "run.json").read_text())["command"]
            assert words[:6] == ["python", "main.py", "fit", "--config", "tiny.yaml", "--config"]
            assert (words[6], words[-1]) == (config, f"--seed_everything={run['seed']}")
    assert main(shlex.split(result["best"]["command"])[2:]) == 0


def test_a_grid_is_run_whole_once_and_its_best_trial_is_the_run_that_its_command_makes(laboratory, capsys, monkeypatch):
    write_space({RATE: {"values": [0.1, 0.0]}})
    result = sweep(capsys, "--sweep", "space.yaml")
    assert [trial["parameters"] for trial in result["trials"]] == [{RATE: 0.1}, {RATE: 0.0}]  # by loss
    runs = [trial["runs"][0] for trial in result["trials"]]
    assert [loss_of(run["folder"]) for run in runs] == [trial["val/loss"] for trial in result["trials"]]
    assert {run["folder"] for run in runs} == folders()
    assert result["edges"] == [{"key": RATE, "value": 0.1, "low": 0.0, "high": 0.1, "edge": "high"}]
    assert study().best_trial.user_attrs["parameters"] == {RATE: 0.1}

    # what others may leave in a study: a trial whose process died before its first heartbeat, a point queued twice
    study().ask()
    study().enqueue_trial({RATE: 0.1})
    monkeypatch.setattr("llmx.sweep.study.GRACE", 1)
    time.sleep(1.1)
    assert sweep(capsys, "--sweep", "space.yaml") == result
    assert len(folders()) == 2

    assert main(command("--sweep", "space.yaml")) == 0
    shown = capsys.readouterr().out
    assert f"{RATE}: 0.1 is AT THE EDGE of 0.0 .. 0.1 (high)" in shown
    assert f"best: {result['best']['command']}" in shown
    assert main(shlex.split(result["best"]["command"])[2:]) == 0
    (folder,) = folders() - {run["folder"] for run in runs}
    assert loss_of(folder) == result["trials"][0]["val/loss"]

    write_space({RATE: {"values": [0.1, 0.2]}})  # the study has another space, and does not mix
    assert "study: tiny-space has other space" in fails(capsys, "--sweep", "space.yaml")
    write_space({RATE: {"values": [0.1, 0.0]}})
    assert "has other settings" in fails(capsys, "--sweep", "space.yaml", "--trainer.max_steps", 3)
    assert "has other seeds" in fails(capsys, "--sweep", "space.yaml", "--seeds", 2)
    assert len(folders()) == 3


def test_a_sampler_keeps_to_the_ranges_reaches_into_lists_and_goes_on_to_the_number_of_trials(laboratory, capsys):
    network = laboratory.config["model"]["network"]["init_args"]
    network["block"] = {"class_path": "Cycle", "init_args": {"blocks": [network["block"], network["block"]]}}
    network["depth"] = 2
    laboratory.configure()
    key = "model.network.block.blocks.1.mixer.heads"
    write_space({key: {"low": 1, "high": 2}, RATE: {"low": 1e-5, "high": 1e-2, "log": True}}, trials=1)
    assert len(sweep(capsys, "--sweep", "space.yaml")["trials"]) == 1
    trials = sweep(capsys, "--sweep", "space.yaml", "--trials", 2)["trials"]
    assert len(folders()) == len(trials) == 2
    for trial in trials:
        heads, rate = trial["parameters"].values()
        assert isinstance(heads, int)
        assert 1 <= heads <= 2
        assert 1e-5 <= rate <= 1e-2
        (run,) = trial["runs"]
        model = yaml.safe_load((Path(run["folder"]) / "config.yaml").read_text())["model"]
        blocks = model["network"]["init_args"]["block"]["init_args"]["blocks"]
        assert [block["init_args"]["mixer"]["init_args"]["heads"] for block in blocks] == [2, heads]
        assert model["optimizer"]["init_args"]["lr"] == rate


def interrupted_at_seed_2(execute, arguments, callback, fit=llmx.sweep.study._fit):
    if "--seed_everything=2" in arguments:
        raise KeyboardInterrupt
    return fit(execute, arguments, callback)


def test_seeds_alone_are_runs_with_their_mean_and_beside_a_space_the_mean_is_the_value(laboratory, capsys, monkeypatch):
    alone = sweep(capsys, "--seeds", 2)
    losses = [trial["val/loss"] for trial in alone["trials"]]
    assert sorted(trial["parameters"]["seed_everything"] for trial in alone["trials"]) == [1, 2]
    assert losses[0] < losses[1]
    assert alone["mean"] == pytest.approx(sum(losses) / 2)
    assert alone["best"] is None
    write_space({RATE: {"values": [0.003]}})
    with monkeypatch.context() as patch:
        patch.setattr(llmx.sweep.study, "_fit", interrupted_at_seed_2)
        assert main(command("--sweep", "space.yaml", "--seeds", 2)) == 130
    (trial,) = sweep(capsys, "--sweep", "space.yaml", "--seeds", 2)["trials"]  # goes on with seed 2
    assert [run["seed"] for run in trial["runs"]] == [1, 2]
    assert trial["val/loss"] == pytest.approx(alone["mean"])  # 0.003 is the default
    assert len(folders()) == 4


def test_a_run_that_is_worse_than_the_others_so_far_is_pruned_and_its_folder_stays(laboratory, capsys, monkeypatch):
    monkeypatch.setattr("optuna.pruners.MedianPruner", partial(optuna.pruners.MedianPruner, n_startup_trials=1))
    write_space({RATE: {"values": [0.1, 0.0]}}, prune=True)
    good, bad = sweep(capsys, "--sweep", "space.yaml", "--trainer.val_check_interval", 1)["trials"]
    assert (good["state"], bad["state"]) == ("complete", "pruned")
    (run,) = bad["runs"]
    assert (run["pruned"], run["step"]) == (True, 1)
    assert (Path(run["folder"]) / "config.yaml").is_file()
    assert not (Path(run["folder"]) / "metrics.json").exists()
    assert main(command("--sweep", "space.yaml", "--trainer.val_check_interval", 1)) == 0
    assert "at step 1, pruned" in capsys.readouterr().out


def test_a_failing_trial_is_shown_with_its_message_and_tried_again_by_the_next_command(laboratory, capsys):
    write_space({HEADS: {"values": [3, 2]}})
    done, failed = sweep(capsys, "--sweep", "space.yaml")["trials"]
    assert done["parameters"] == {HEADS: 2}
    assert "3 heads must divide dim 8" in failed["error"]
    assert main(command("--sweep", "space.yaml")) == 0
    assert "3 heads must divide dim 8" in capsys.readouterr().out
    assert [trial.number for trial in study().trials if trial.params == {HEADS: 3}] == [0, 2]
    assert len(folders()) == 1
    write_space({HEADS: {"values": [3, 5]}})
    message = fails(capsys, "--sweep", "space.yaml", "--study", "hopeless")
    assert "every trial failed; the first: model.network.block.mixer.heads: 3 heads must divide dim 8" in message


def test_the_table_has_the_best_first_and_marks_what_leaks_which_is_never_the_best(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    space = Space({"model.network.block.mixer.init_args.heads": Values((1, 2, 4)), "model.other.heads": Values((1,))})

    def trial(state, heads, value=None, **attributes):
        point = {key: heads if key.endswith("init_args.heads") else 1 for key in space.dimensions}
        kinds = {key: optuna.distributions.CategoricalDistribution(d.values) for key, d in space.dimensions.items()}
        return optuna.trial.create_trial(
            state=state, value=value, params=point, distributions=kinds, user_attrs=attributes
        )

    states = optuna.trial.TrialState
    leaking = [{"seed": s, "folder": f"run_{s}", "val/loss": 1.0 + s, "leaking": True} for s in (1, 2)]
    honest = [{"seed": 1, "folder": "run_3", "val/loss": 3.0, "leaking": False}]
    trials = [
        trial(states.FAIL, 1, error="words " * 100),
        trial(states.COMPLETE, 2, 3.0, runs=honest),
        trial(states.COMPLETE, 4, 2.5, runs=leaking),
    ]
    report = Report("study", space, trials, ["fit"], means=False)
    report.show()
    output = capsys.readouterr().out
    best, second, failed = (line for line in output.splitlines() if "run_" in line or "words" in line)
    assert "3.0000  run_3" in best
    assert "2.5000, SD 0.7071  LEAKING run_1, run_2" in second
    assert failed.rstrip().endswith("...")
    assert "mixer.heads" in output
    assert "other.heads" in output
    assert "model.network.block.mixer.init_args.heads: 2 is inside 1 .. 4" in output
    assert report.to_dict()["best"]["command"].endswith("heads=2 --model.other.heads=1 --seed_everything=1")
    halves = [[{**honest[0], "protocol": {"split": [0.9, 0.1, 0], "window": w}}] for w in (8, 16)]
    report = Report("study", space, [trial(states.COMPLETE, 2, 3.0, runs=r) for r in halves], ["fit"], means=False)
    report.show()
    shown = capsys.readouterr().out
    assert "best: none, for these losses are not of one kind: not the same data.window" in shown
    report = Report("study", space, trials[2:], ["fit"], means=False)
    report.show()
    assert "best: none, for what was trained is LEAKING" in capsys.readouterr().out
    assert (report.to_dict()["best"], report.to_dict()["edges"]) == (None, [])
    unaudited = trial(states.COMPLETE, 2, 2.0, runs=[{**honest[0], "audited": False}])
    report = Report("study", space, [*trials, unaudited], ["fit"], means=False)
    report.show()
    assert "UNAUDITED run_3" in capsys.readouterr().out
    assert report.best is trials[1]
    Report("study", space, trials[2:], ["fit"], means=True).show()
    assert "LEAKING: this network sees the future, its numbers mean nothing. val loss 2.5" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- processes
def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, str(CHECKOUT / "main.py"), *command(*arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_that_start_at_once_share_a_study_and_run_each_point_once(laboratory):
    rates = [0.1, 0.03, 0.01]
    write_space({RATE: {"values": rates}})
    workers = [start("--sweep", "space.yaml", "--format", "json") for _ in range(2)]
    outputs = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    first, second = (json.loads(output) for output, _ in outputs)
    assert first == second
    assert sorted(trial["parameters"][RATE] for trial in first["trials"]) == sorted(rates)
    assert {run["folder"] for trial in first["trials"] for run in trial["runs"]} == folders()
    assert len(folders()) == len(rates)


def test_the_point_of_a_killed_process_is_run_by_the_next(laboratory, capsys, monkeypatch):
    Path("hang.py").write_text(HANG)
    write_space({RATE: {"values": [0.1, 0.03]}})
    arguments = ["--sweep", "space.yaml", "--trainer.callbacks", "hang.Hang"]
    worker = start(*arguments, HANG="1")
    deadline = time.monotonic() + 200
    while not Path("hanging").exists():
        assert worker.poll() is None, worker.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    monkeypatch.setattr("llmx.sweep.study.GRACE", 1)
    monkeypatch.setattr("llmx.sweep.study.POLL", 0.1)
    trials = sweep(capsys, *arguments)["trials"]
    sys.modules.pop("hang")
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert sorted(trial["parameters"][RATE] for trial in trials) == [0.03, 0.1]
    killed = next(trial for trial in study().trials if trial.state == optuna.trial.TrialState.FAIL)
    assert killed.params == {RATE: 0.1}
    assert Path(killed.user_attrs["runs"][0]["folder"]).is_dir()
    assert len(folders()) == 3


# -------------------------------------------------------------------------------------------------------------- space
def test_the_space_reads_numbers_as_the_parser_of_fit_does(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(
        "space:\n  a: {values: [1e-3, 3E-3, .5e+1, 1e5x]}\n  b: {low: 1, high: 8, step: 1}\n"
        "  c: {low: 1e-4, high: 1, log: true}\n  d: {low: 0, high: 1, step: 0.25}\n"
        "  e: {values: [[0.9, 1e-5], yes, null]}\n"
    )
    dimensions = read_space(path).dimensions
    assert dimensions == {
        "a": Values((0.001, 0.003, 5.0, "1e5x")),
        "b": Range(1, 8, step=1),
        "c": Range(1e-4, 1, log=True),
        "d": Range(0.0, 1, step=0.25),
        "e": Values(("[0.9, 1e-05]", True, None)),
    }
    assert isinstance(dimensions["b"].low, int)
    assert isinstance(dimensions["d"].low, float)
    assert flags({"a": 1e-05, "b": -1, "c": True, "d": None, "e": "GRU"}) == [
        *("--a=1.0e-05", "--b=-1", "--c=true", "--d=null", "--e=GRU")
    ]


def test_an_optimum_near_the_end_of_a_range_is_at_its_edge():
    logarithmic = Range(1e-4, 1e-2, log=True)
    assert [logarithmic.edge(x) for x in (1e-4, 1.2e-4, 2e-4, 1e-3, 9e-3)] == ["low", "low", None, None, "high"]
    assert [Range(1, 8).edge(x) for x in (1, 2, 8)] == ["low", None, "high"]
    assert [Values((3, 1, 2)).edge(x) for x in (1, 2, 3)] == ["low", None, "high"]
    assert Values(("GRU", "LSTM")).ends is None
    assert Values((1,)).ends is None


def test_the_learning_rates_of_the_collection_are_a_grid_of_three():
    assert read_space(CHECKOUT / "configs/sweeps/learning_rate.yaml").points() == [
        {RATE: 0.001},
        {RATE: 0.003},
        {RATE: 0.01},
    ]


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ("space: {}", "space: empty in space.yaml"),
        ("trials: 3", "space: empty in space.yaml"),
        ("space: [1]", "space: empty in space.yaml"),
        ("spaces: {}", "space.yaml: give a mapping of space"),
        ("space: {a: [1", "space.yaml: not valid YAML"),
        ("space: {data.window: 8}", "space.data.window: give either values, a list, or low and high"),
        ("space: {data.window: {values: []}}", "space.data.window.values: give a list of at least one value"),
        ("space: {data.window: {values: [8, 8]}}", "space.data.window.values: 8 is there twice"),
        ("space: {data.window: {low: 8, high: 4}}", "space.data.window: low 8 must be below high 4"),
        ("space: {data.window: {low: 8, high: 8}}", "space.data.window: low 8 must be below high 8"),
        ("space: {data.window: {low: 8, high: many}}", "space.data.window.high: 'many' is no number"),
        ("space: {data.window: {low: 0, high: 8, log: true}}", "space.data.window: a logarithmic range begins above 0"),
        (
            "space: {data.window: {low: 1, high: 8, step: 3}}",
            "space.data.window.step: 3 must lead from low 1 to high 8",
        ),
        ("space: {data.window: {low: 1, high: 8}}", "trials: a range has no last combination"),
        ("space: {data.window: {low: 1, high: 8}}\ntrials: 0", "trials: 0"),
        ("space: {data.window: {values: [8]}}\nprune: 1", "prune: 1 is neither true nor false"),
        (
            "space: {data.windows: {values: [8]}}",
            "data.windows: not an argument of TextDataModule; did you mean window?",
        ),
        (f"space: {{{HEADS}z: {{values: [2]}}}}", "headsz: not an argument of Attention; did you mean heads?"),
        ("space: {ckpt_path: {values: [last]}}", "ckpt_path: a sweep's runs are new ones"),
    ],
)
def test_a_mistake_in_the_space_is_one_message_and_leaves_no_study(laboratory, capsys, space, expected):
    Path("space.yaml").write_text(space)
    assert expected in fails(capsys, "--sweep", "space.yaml")
    assert not Path("lightning_logs").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "sweep: give --sweep FILE"),
        (["--sweep", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["--sweep", "space.yaml", "--trials", 0], "trials: 0 is below 1"),
        (["--sweep", "space.yaml", "--trials", "many"], "sweep: argument --trials: invalid int value: 'many'"),
        (["--seeds", 0], "seeds: 0 is below 1"),
        (["--seeds", 2, "--trainer.max_stepz", 3], "trainer.max_stepz: not an argument of Trainer"),
        (["--seeds", 2, "--trainer.devices", 2], "trainer.devices: 2, but a sweep trains on one"),
        (
            ["--seeds", 2, "--storage", "sqlite:////proc/nowhere/x.db"],
            "storage: sqlite:////proc/nowhere/x.db cannot be",
        ),
        (["--seeds", 2, "--storage", "abacus://me:secret@here/x"], "storage: abacus://me:***@here/x cannot be opened"),
        (["--seeds", 2, "--storage", "x.db"], "storage: x.db cannot be opened"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(laboratory, capsys, arguments, expected):
    write_space({RATE: {"values": [0.1]}})
    assert expected in fails(capsys, *arguments)
    assert not Path("lightning_logs").exists()


def test_without_optuna_the_message_says_how_to_get_it(laboratory, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "llmx.sweep.study", raising=False)
    assert "pip install -e '.[sweep]'" in fails(capsys, "--seeds", 2)


def test_a_study_that_sweep_did_not_make_is_refused(laboratory, capsys, monkeypatch):
    monkeypatch.setattr("llmx.sweep.study.CREATION", 0.1)
    optuna.create_study(study_name="theirs", storage="sqlite:///theirs.db")
    message = fails(capsys, "--seeds", 2, "--storage", "sqlite:///theirs.db", "--study", "theirs")
    assert "study: theirs was not made by sweep" in message
