"""What people see of finished runs: the real TensorBoard, and report.html, in a headless Chromium."""

import re
import subprocess
import sys
import time

import pytest

from testbed.tiny import network
from tests.browser import CHROMIUM, Browser
from tests.laboratory import Laboratory, metrics_of, working_in

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to look with"),
    pytest.mark.xdist_group("browser"),  # the runs, the TensorBoard and the browser are there once
]
TEXT = "".join(f"{i * i % 97:02d}: the quick brown fox, {i % 13} lazy dogs;\n" for i in range(120))
MIXERS = ("Attention", "GRU")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two finished runs with different mixers and batches."""
    folder = tmp_path_factory.mktemp("runs")
    maps = {"class_path": "MixerMaps", "init_args": {"sentence": "12: fox"}}
    with pytest.MonkeyPatch.context() as patch, working_in(folder, patch):
        laboratory = Laboratory(folder)
        laboratory.write_corpus(TEXT)
        trainer = {"max_steps": 6, "val_check_interval": 3, "log_every_n_steps": 2}
        trainer |= {"default_root_dir": str(folder), "callbacks": ["NormsByLayer", maps]}
        laboratory.configure(
            trainer=trainer, data={"corpus": str(folder / "corpus.txt")}, model={"network": network(2)}
        )
        laboratory.fit()
        laboratory.fit("--model.network.block.mixer", "GRU", "--data.batch_size", 2)
        laboratory.run("compare", "lightning_logs", "--unranked")
    return folder


@pytest.fixture(scope="module")
def metrics(runs):
    return [metrics_of(runs / f"lightning_logs/version_{i}") for i in range(len(MIXERS))]


@pytest.fixture(scope="module")
def board(runs):
    """The address of a TensorBoard that shows the runs."""
    said = runs / "tensorboard.txt"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs / "lightning_logs")]
    with said.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0"], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < until, said.read_text()
            time.sleep(0.1)
        yield found[0]
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"), height=1600)
    yield browser
    browser.close()


def test_curves_are_drawn_and_end_with_the_final_loss(board, browser, metrics):
    browser.open(f"{board}?tagFilter=loss%24#timeseries")
    browser.wait_for("found('line-chart canvas').length >= 3")  # final/loss, train/loss, val/loss
    for run, final in enumerate(metrics):
        browser.wait_for(f"/version_{run} [0-9.]+ {re.escape(format(final['val/loss'], '.5g'))} 5 /.test(text())")
    browser.open(f"{board}#scalars")
    browser.wait_for("text().includes('loss_by_tokens') && found('path.line').length >= 2")
    assert browser.errors == []


def test_training_and_validation_loss_share_a_chart_by_step_and_one_by_tokens(board, browser):
    browser.open(f"{board}#custom_scalars")
    browser.wait_for("found('.toggle-matches-button').length == 4")
    # 2 runs x 2 splits, twice; 2 runs x (2 layers, embedding, norm, head), twice
    page = browser.wait_for(
        "/Matches \\(4\\).*Matches \\(4\\).*Matches \\(10\\).*Matches \\(10\\)/.test(text()) && text()"
    )
    titles = ("training and validation, by step", "training and validation, by tokens seen", "gradients", "weights")
    assert [title for title in titles if title in page] == list(titles)
    browser.wait_for("found('path.line').length >= 28")
    browser.ask("found('.toggle-matches-button').forEach(button => button.click())")
    for series in ("train/loss (version_0)", "val/loss (version_1)", "loss_by_tokens/val (version_1)"):
        browser.wait_for(f"text().includes({series!r})")
    assert browser.errors == []


def test_the_table_of_hparams_has_settings_and_final_metrics_of_all_runs(board, browser, metrics):
    browser.open(f"{board}#hparams")
    cells = "found('vaadin-grid-cell-content').map(cell => cell.textContent.trim())"
    table = browser.wait_for(f"(cells => cells.includes('version_1') && cells)({cells})")
    assert {"data/batch_size", "model/network/block/mixer"} <= set(table)  # those that differ come first
    assert {"final/loss", "final/perplexity", "final/parameters"} <= set(table)
    for run, final in enumerate(metrics):
        row = table[table.index(f"version_{run}") :]
        assert MIXERS[run] in row
        assert f"{final['val/loss']:#.5g}" in row
        assert f"{final['val/perplexity']:#.5g}" in row
    assert browser.errors == []


def test_samples_are_shown_as_text(board, browser):
    browser.open(f"{board}#text")
    browser.wait_for("found('pre').length >= 4")  # two validations of two runs
    page = browser.ask("text()")
    assert "samples/text_summary" in page
    assert all(len(sample) > 150 for sample in browser.ask("found('pre').map(sample => sample.textContent)"))
    assert browser.errors == []


def test_influence_and_maps_are_shown_as_images(board, browser):
    browser.open(f"{board}#images")
    browser.wait_for("found('img').filter(image => image.naturalWidth > 400).length == 4")
    page = browser.ask("text()")
    assert "audit/influence" in page
    assert "maps/mixers" in page
    assert browser.errors == []


def test_the_report_needs_nothing_but_itself(runs, browser, metrics):
    address = (runs / "comparison" / "report.html").as_uri()
    browser.open(address)
    browser.wait_for("document.readyState == 'complete' && found('img').length >= 3")
    assert browser.ask("found('img').every(image => image.naturalWidth > 400)")
    assert [request for request in browser.requests if not request.startswith("data:")] == [address]
    rows = browser.ask("found('#results tbody tr').map(row => row.innerText)")
    assert len(rows) == len(MIXERS)
    for final in metrics:
        assert any(f"{final['val/loss']:.4f}" in row for row in rows)
    width = browser.ask("[document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]  # wide tables scroll by themselves
    assert browser.errors == []
