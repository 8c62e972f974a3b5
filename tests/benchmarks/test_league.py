"""The league's bookkeeping, with runs that are made up and a few that are not, and the page that is made of it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.league import __main__ as league
from benchmarks.league import entries
from benchmarks.league.entries import ADAPTED, BASELINE, LONG, SELECTING, SHORT, Entry, Stage, Trial, names, new_entry
from benchmarks.league.page import FIGURE, PAGE, figure, page, render, table
from llmx.errors import UserError

PROTOCOL = {"corpus": "text", "split": [0.9, 0.1, 0.0], "batch_size": 16, "window": 128, "precision": "32-true"}
PROTOCOL |= {"compiled": False, "gradient_clip_val": 1.0}
RECIPE = {"optimizer": "AdamW", "betas": [0.9, 0.99], "weight_decay": 0.1, "warmup_steps": 100, "minimum_ratio": 0.1}


def entry(name: str, **values) -> Entry:
    known = {"config": "", "rate": 3e-3, "parameters": 800_000, "training_flops_per_token": 5e6}
    return Entry(name=name, **{**known, "counts": False, "apart": None, "runs": [], **values})


def made_up(trial: Trial, loss: float | None) -> dict:
    protocol = PROTOCOL | {"steps": trial.stage.steps}
    origin = {"protocol": protocol, "recipe": RECIPE, "commit": "c", "torch": "2", "device": "d", "threads": 1}
    return {"stage": trial.stage.name, "rate": trial.rate, "seed": trial.seed, "loss": loss, "seconds": 9, **origin}


def valley(bottom: float, height: float = 1.6):
    """A loss with its minimum at a learning rate, a little higher with every seed."""
    return lambda trial: height + abs(math.log(trial.rate / bottom)) / 10 + trial.seed / 1000


def run_out(of: Entry, loss, stage: Stage = SHORT) -> list[tuple[float, int]]:
    """Runs all trials of a stage; returns their (rate, seed)."""
    asked = []
    while (trial := of.next_trial(stage)) is not None:
        of.runs.append(made_up(trial, loss(trial)))
        asked.append((trial.rate, trial.seed))
    return asked


# ------------------------------------------------------------------------------------------------------- what is run
@pytest.mark.parametrize("bottom", [2e-3, 3e-3, 4e-3])
def test_three_rates_with_one_seed_and_the_best_with_fresh_ones(bottom: float):
    inside = entry("a")
    asked = run_out(inside, valley(bottom))
    assert asked[:3] == [(3e-3, SELECTING), (1e-3, SELECTING), (9e-3, SELECTING)]
    assert asked[3:] == [(3e-3, seed) for seed in SHORT.seeds]
    assert inside.complete(SHORT)
    assert not inside.at_edge()


def test_no_seed_serves_twice():
    seeds = [SELECTING, *SHORT.seeds, *LONG.seeds]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("bottom", "beyond", "best", "edge"),
    [(1e-2, 2.7e-2, 9e-3, False), (1.0, 2.7e-2, 2.7e-2, True), (9e-4, 3.33e-4, 1e-3, False)],
)
def test_a_best_rate_at_an_edge_earns_one_rate_more_and_only_one(bottom, beyond, best, edge):
    found = entry("a")
    asked = run_out(found, valley(bottom))
    assert asked[3] == (beyond, SELECTING)
    assert asked[4:] == [(best, seed) for seed in SHORT.seeds]
    assert found.at_edge() == edge


def test_a_rate_that_diverges_is_not_the_best_and_three_of_them_end_it():
    high = entry("a")
    run_out(high, lambda trial: None if trial.rate > 5e-3 else valley(1e-2)(trial))
    assert high.best_rate() == 3e-3
    assert not high.at_edge()
    hopeless = entry("b")
    assert len(run_out(hopeless, lambda _: None)) == 3
    assert not hopeless.complete(SHORT)
    assert hopeless.next_trial(LONG) is None
    assert "diverged at every rate, 0.001, 0.003, 0.009" in render([hopeless])


def test_the_long_stage_takes_over_the_rate_and_nothing_else():
    found = entry("a")
    assert found.next_trial(LONG) is None
    run_out(found, valley(9e-3))
    assert run_out(found, valley(9e-3), LONG) == [(9e-3, seed) for seed in LONG.seeds]
    assert found.tried().keys() == {1e-3, 3e-3, 9e-3, 2.7e-2}


def test_a_network_that_counts_is_run_once_and_one_that_stands_apart_never():
    counting = entry("ngram", counts=True, parameters=0)
    assert run_out(counting, valley(1)) == [(3e-3, SELECTING)]
    assert run_out(counting, valley(1), LONG) == []
    assert run_out(entry("a", apart="too large"), valley(1)) == []
    said = render([counting, entry("a", apart="too large", parameters=9_000_000)])
    assert "ngram: counts instead of being trained" in said
    assert "a: not run: too large (9,000,000 parameters)" in said


def test_the_best_and_the_classics_go_on():
    everyone = [entry(name) for name in [BASELINE, *(f"n{i:02d}" for i in range(12))]]
    for number, found in enumerate(everyone):
        run_out(found, valley(3e-3, 2 - number / 100))
    everyone.append(entry("unfinished"))
    assert entries.finalists(everyone) == [f"n{i:02d}" for i in range(11, 1, -1)] + [BASELINE]


def test_of_the_collection_what_leaks_or_has_another_size_stands_apart_and_all_others_take_the_window(monkeypatch):
    found = {name: new_entry(name) for name in ("expert_choice", "ngram", BASELINE, *ADAPTED)}
    assert "LEAKING" in found["expert_choice"].apart
    assert found["ngram"].counts
    for name in (BASELINE, *ADAPTED):
        assert found[name].apart is None
        assert 760_000 <= found[name].parameters <= 840_000
    assert names()[0] == BASELINE
    assert not {"base", "record", "fast"} & set(names())
    assert "ngram" in names()
    with pytest.raises(UserError, match="nonesuch"):
        new_entry("nonesuch")
    monkeypatch.setattr(entries, "ADAPTED", {})
    assert "parameters" in new_entry("moe").apart


# --------------------------------------------------------------------------------------------------- how it is kept
@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(league, "RUNS", tmp_path / "runs")
    return tmp_path


def test_what_is_done_is_skipped_after_a_stop_and_unknown_again_when_the_config_changes(place, monkeypatch):
    asked = []

    def fit(trial: Trial, lock: int) -> dict:
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append((trial.rate, trial.seed))
        run = made_up(trial, valley(3e-3)(trial))
        return {key: run[key] for key in run.keys() - {"stage", "rate", "seed"}}

    monkeypatch.setattr(league, "run_fit", fit)
    with pytest.raises(KeyboardInterrupt):
        league.run_architecture("llama", SHORT)
    assert [len(found.runs) for found in entries.read_entries()] == [4]
    before, asked[:] = list(asked), []
    done = league.run_architecture("llama", SHORT)
    assert len(before + asked) == len(set(before + asked)) == 6
    assert done == entries.read_entry(place / "results" / "llama.json")
    asked.clear()
    assert league.run_architecture("llama", SHORT) == done
    assert asked == []
    monkeypatch.setattr(entries, "PROTOCOL", entries.PROTOCOL | {"data.batch_size": "8"})
    with pytest.raises(KeyboardInterrupt):
        league.run_architecture("llama", SHORT)
    assert len(asked) == 4


def test_an_architecture_that_another_instance_is_at_is_left_to_it(place):
    with league.locked(place / "runs" / "llama.lock"):
        assert league.run_architecture("llama", SHORT) is None
    assert not (place / "results").exists()


@pytest.fixture
def tiny(place, monkeypatch):
    """A config whose run takes no time, under a protocol of its own."""
    configs = place / "configs"
    configs.mkdir()
    (place / "corpus.txt").write_text("".join(f"{i * i % 97:02d} the quick brown fox;\n" for i in range(60)))
    model = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.99], "weight_decay": 0.1}}}
    model["schedule"] = {"class_path": "Cosine", "init_args": {"warmup_steps": 0, "minimum_ratio": 0.1}}
    mixer = {"class_path": "Attention", "init_args": {"heads": 2}}
    feed_forward = {"class_path": "SwiGLU", "init_args": {"hidden": 8}}
    block = {"class_path": "PreNormBlock", "init_args": {"mixer": mixer, "feed_forward": feed_forward}}
    model["network"] = {"class_path": "Decoder", "init_args": {"dim": 8, "depth": 1, "block": block}}
    (configs / "tiny.yaml").write_text(yaml.safe_dump({"model": model}))
    monkeypatch.setattr(entries, "CONFIGS", configs)
    protocol = {"data.corpus": str(place / "corpus.txt"), "data.window": "8", "data.batch_size": "4"}
    protocol |= {"data.sampling": "random", "trainer.precision": "32-true", "trainer.limit_val_batches": "2"}
    monkeypatch.setattr(entries, "PROTOCOL", protocol | {"trainer.enable_progress_bar": "false"})


def test_a_run_goes_on_from_its_checkpoint_and_a_diverging_one_is_a_result(tiny, place, monkeypatch):
    monkeypatch.setattr(league, "BLOCK", 8)
    trial = Trial("tiny", replace(LONG, steps=4), 3e-3, 2)
    league.run_fit(trial._replace(stage=replace(LONG, steps=2)), _lock(place))
    run = league.folder(trial) / "lightning_logs" / "version_0"
    (run / "metrics.json").unlink()  # it was stopped after step 2
    kept = league.run_fit(trial, _lock(place))
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["step"], metrics["steps_in_these_seconds"]) == (4, 2)
    assert kept["loss"] == round(metrics["val/loss"], 5)
    assert np.mean(kept["block_means"]) == pytest.approx(kept["loss"], abs=1e-4)
    assert len(kept["block_means"]) == 8  # of 2 batches of 4 windows
    assert kept["recipe"] == RECIPE | {"optimizer": "torch.optim.AdamW", "schedule": "Cosine", "warmup_steps": 0}
    assert kept["protocol"]["sampling"] == "random"
    assert league.run_fit(trial, _lock(place)) == kept  # it had ended, and was not yet written down
    diverging = league.run_fit(trial._replace(rate=1e30), _lock(place))
    assert diverging["loss"] is None
    assert diverging["recipe"] == kept["recipe"]


def _lock(place: Path) -> int:
    return (place / "lock").open("w").fileno()


# --------------------------------------------------------------------------------------------------------- the page
def test_the_page_is_in_step_with_the_results():
    assert PAGE.read_text() == page(), "run python -m benchmarks.league --page"
    assert ("images/league.png" in page()) <= FIGURE.is_file()


def some_entries() -> list[Entry]:
    """Of the second and third the second is hardly, and the third clearly another than the baseline."""
    entries = [entry(BASELINE), entry("near"), entry("far")]
    for found, height in zip(entries, (1.6, 1.6005, 1.5), strict=True):
        run_out(found, valley(3e-3, height))
    return entries


def test_rows_are_ordered_and_compared_under_one_pooled_deviation():
    found = table(some_entries(), SHORT)
    assert [row.entry.name for row in found.rows] == ["far", BASELINE, "near"]
    assert (found.spread.deviation, found.spread.freedom) == (pytest.approx(0.001), 6)
    far, baseline, near = found.rows
    assert baseline.difference is None
    assert near.adjusted_p > 0.5
    assert far.adjusted_p < 1e-6
    assert far.loss.value == pytest.approx(1.503)
    said = render(some_entries(), "Nothing.")
    assert "## What was learned\n\nNothing." in said
    assert "| 1 | [far](architectures.md#far)† | 1.5030 ± 0.0014 | -0.1000 ± 0.0020 | < 0.001 |" in said
    assert len(figure([found]).axes) == 1


def test_differences_over_the_text_need_blocks_of_both():
    entries = some_entries()
    for found in entries:
        run_out(found, valley(3e-3), LONG)
    assert all(row.over_text is None for row in table(entries, LONG).rows)
    noise = np.random.default_rng(0).normal(1.6, 0.1, 50)
    for found, shift in zip(entries, (0.0, 0.25, -0.25), strict=True):
        for run in found.reported(LONG):
            run["block_means"] = (noise + shift).tolist()
    differences = {row.entry.name: row.over_text for row in table(entries, LONG).rows}
    assert differences[BASELINE] is None
    assert differences["near"].value == pytest.approx(0.25)
    assert "± over text" in render(entries)


def test_runs_of_another_protocol_are_refused():
    entries = some_entries()
    entries[1].reported(SHORT)[0]["protocol"]["precision"] = "bf16-mixed"
    with pytest.raises(UserError, match=r"near: precision is bf16-mixed .* but 32-true"):
        render(entries)


def test_an_architecture_without_all_its_seeds_has_no_rank():
    entries = some_entries()
    entries[2].reported(SHORT)[0]["loss"] = None
    entries[1].runs.pop()
    said = render(entries)
    assert [row.entry.name for row in table(entries, SHORT).rows] == [BASELINE]
    assert f"far: diverged at its best rate, 0.003, with seed {SHORT.seeds[0]} of short training" in said
    assert "near: not all of its runs have ended" in said


def test_a_recipe_of_its_own_is_said():
    entries = some_entries()
    for run in entries[2].runs:
        run["recipe"] = RECIPE | {"weight_decay": 0.0}
    assert "far differs, as its method asks for: weight decay 0.0." in render(entries)
    assert table([], SHORT) is None
