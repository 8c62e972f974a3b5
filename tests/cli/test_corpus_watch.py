"""A component that opens a file of the corpus, or its cache, ends the run with its name."""

import json
from pathlib import Path

import pytest
import torch

from llmx.data.token_files import write_tokens
from llmx.data.tokenizers import ByteTokenizer
from llmx.errors import UserError
from llmx.protocol import Mixer
from testbed.tiny import TEXT
from tests.laboratory import metrics_of, newest_run, record_of
from tests.training.networks import factory
from tests.training.test_auditing import notebook

READER = """
import glob, io, json, os, pathlib
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import torch
from llmx.data.corpora import load_corpus
from llmx.data.datamodule import TextDataModule
from llmx.protocol import Mixer

class Reader(Mixer):
    def __init__(self, site):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(site.dim))
        self.calls = 0
        {built}

    def read(self, *path):
        {read}

    def in_thread(self):
        return open("corpus.txt").read()

    def after_optimizer_step(self):
        self.calls += 1
        {stepped}

    def forward(self, x, context):
        {run}
        return x * self.weight
"""
BACKWARD = """
class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        open("corpus.txt")  # here
        return gradient
"""
PLAIN = 'return open("corpus.txt").read()'


def with_reader(laboratory, built="pass", run="pass", stepped="pass", read=PLAIN):
    """A mixer that runs these statements when it is built, in each pass, and after each step."""
    Path("reader.py").write_text(READER.format(built=built, run=run, stepped=stepped, read=read))
    laboratory.config["model"]["network"]["init_args"]["block"]["init_args"]["mixer"] = {"class_path": "reader.Reader"}
    laboratory.configure()
    return laboratory


def line_of(statement):
    return next(n for n, line in enumerate(Path("reader.py").read_text().splitlines(), 1) if statement in line)


def test_a_component_that_reads_the_corpus_when_it_is_built_is_named(laboratory, capsys):
    message = with_reader(laboratory, built="self.read()").refusal(capsys, "fit", "--config", "tiny.yaml")
    assert message.startswith(f"error: Reader opens the corpus corpus.txt (reader.py, line {line_of(PLAIN)})")
    assert "--model.audit warn" in message


@pytest.mark.parametrize(
    "read",
    [
        'return pathlib.Path("corpus.txt").resolve().read_bytes()',
        'return np.fromfile("corpus.txt", np.uint8)',
        'return np.memmap("corpus.txt", np.uint8, "r")[:4].sum()',
        'return os.open("corpus.txt", os.O_RDONLY)',
        'return [io.open(os.path.abspath("corpus.txt"), "rb")]',
        'return load_corpus("corpus.txt").text',
        'return TextDataModule("corpus.txt").tokens("val")',
        'os.symlink(os.path.abspath("corpus.txt"), name := f"link-{id(self)}"); return open(name)',
        'os.link("corpus.txt", name := f"link-{id(self)}"); return open(name)',
        "list(ThreadPoolExecutor().map(Reader.in_thread, [self]))",
    ],
)
def test_the_corpus_is_found_however_it_is_opened(laboratory, capsys, read):
    message = with_reader(laboratory, built="self.read()", read=read).refusal(capsys, "fit", "--config", "tiny.yaml")
    assert message.startswith("error: Reader opens the corpus corpus.txt (reader.py, line ")


def test_a_component_that_reads_the_corpus_in_a_pass_is_named_with_its_place(laboratory, capsys):
    message = with_reader(laboratory, run="self.read()").refusal(capsys, "fit", "--config", "tiny.yaml")
    assert message.startswith("error: blocks.0.mixer (Reader) opens the corpus corpus.txt (reader.py, line ")


def test_the_first_pass_is_watched_too(laboratory, capsys):
    once = "self.text = getattr(self, 'text', None) or self.read()"
    message = with_reader(laboratory, run=once).refusal(capsys, "fit", "--config", "tiny.yaml")
    assert "blocks.0.mixer (Reader) opens the corpus corpus.txt" in message


def test_a_component_that_swallows_every_error_does_not_hide(laboratory, capsys):
    swallowing = "try: self.read()\n        except BaseException: pass"
    message = with_reader(laboratory, run=swallowing).refusal(capsys, "fit", "--config", "tiny.yaml")
    assert "blocks.0.mixer (Reader) opens the corpus corpus.txt" in message


@pytest.mark.parametrize(
    "when",
    [
        {"run": "self.calls < 3 or self.read()"},
        {"run": "self.calls < 5 or self.training or self.read()"},
        {"stepped": "self.calls < 3 or self.read()"},
    ],
)
def test_a_component_that_reads_the_corpus_after_some_steps_ends_the_run(laboratory, capsys, when):
    with_reader(laboratory, **when).run("fit", "--config", "tiny.yaml", code=2)
    assert "error: blocks.0.mixer (Reader) opens the corpus corpus.txt" in capsys.readouterr().err
    assert not (newest_run() / "metrics.json").exists()


def test_a_backward_pass_that_reads_the_corpus_ends_the_run(laboratory, capsys):
    with_reader(laboratory, run="x = Through.apply(x)")
    with Path("reader.py").open("a") as file:
        file.write(BACKWARD)
    laboratory.run("fit", "--config", "tiny.yaml", code=2)
    assert f"opens the corpus corpus.txt (reader.py, line {line_of('# here')})" in capsys.readouterr().err


def test_a_compiled_network_is_watched(laboratory, capsys):
    with_reader(laboratory, run="self.calls < 2 or self.read()")
    laboratory.run("fit", "--config", "tiny.yaml", "--model.compile", "true", code=2)
    assert "error: blocks.0.mixer (Reader) opens the corpus corpus.txt" in capsys.readouterr().err


def test_the_cache_of_encoded_corpora_counts(laboratory, capsys):
    cache = "[np.load(path) for path in glob.glob(os.environ['LLMX_CACHE'] + '/tokens/*.npy')]"
    message = with_reader(laboratory, built=cache).refusal(capsys, "fit", "--config", "tiny.yaml")
    assert message.startswith("error: Reader opens the corpus ")
    assert "/cache/tokens/" in message


def test_token_files_count(laboratory, capsys):
    write_tokens("tokens", [TEXT], ByteTokenizer())
    with_reader(laboratory, run="np.fromfile('tokens/000000.bin', np.uint8)")
    laboratory.configure(data={"corpus": "tokens"})
    message = laboratory.refusal(capsys, "fit", "--config", "tiny.yaml")
    assert message.startswith("error: blocks.0.mixer (Reader) opens the corpus tokens/000000.bin")


def test_a_reader_that_is_let_through_marks_the_run(laboratory, capsys):
    with_reader(laboratory, built="self.read()", run="self.read()")
    with pytest.warns(UserWarning, match=r"LEAKING: .*Reader.* opens the corpus corpus.txt") as warned:
        folder = laboratory.fit("--model.audit", "warn")
    assert sum("opens the corpus" in str(warning.message) for warning in warned) == 3  # built, and run in two layers
    assert record_of(folder)["leaking"] is True
    assert metrics_of(folder)["leaking"] is True
    assert "LEAKING" in capsys.readouterr().out.strip().splitlines()[-1]
    laboratory.run("validate", "--ckpt_path", folder / "checkpoints/last.ckpt", "--model.audit", "error", code=2)
    assert "Reader opens the corpus corpus.txt" in capsys.readouterr().err


def test_a_reader_that_training_meets_late_marks_the_run_at_its_end(laboratory):
    with_reader(laboratory, run="self.calls < 5 or self.read()")
    with pytest.warns(UserWarning, match=r"LEAKING: blocks\.\d\.mixer \(Reader\) opens the corpus"):
        folder = laboratory.fit("--model.audit", "warn")
    assert metrics_of(folder)["leaking"] is True


def test_nothing_is_watched_without_audit(laboratory, recwarn):
    folder = with_reader(laboratory, built="self.read()", run="self.read()").fit("--model.audit", "off")
    assert metrics_of(folder)["leaking"] is False
    assert not [warning for warning in recwarn if "opens the corpus" in str(warning.message)]


def test_a_component_that_reads_a_file_of_its_own_is_honest(laboratory):
    Path("own.json").write_text(json.dumps({"scale": 1.0}))
    own = "json.loads((pathlib.Path(__file__).parent / 'own.json').read_text())"
    folder = with_reader(laboratory, built=own, run=own).fit()
    assert metrics_of(folder)["leaking"] is False


def test_a_corpus_of_pythons_sources_is_read_by_python_itself(laboratory, capsys):
    laboratory.configure(data={"corpus": "stdlib"}, trainer={"max_steps": 1, "limit_val_batches": 1})
    lines = "import linecache, argparse; linecache.clearcache(); linecache.getlines(argparse.__file__)"
    with_reader(laboratory, run=f"{lines}; self.calls and open(argparse.__file__)")
    laboratory.run("fit", "--config", "tiny.yaml", code=2)
    assert "blocks.0.mixer (Reader) opens the corpus " in capsys.readouterr().err


class Remembering(Mixer):
    """Reads the corpus when it is built."""

    def __init__(self, site):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(site.dim))
        self.text = Path("corpus.txt").read_text()

    def forward(self, x, context):
        return x * self.weight


def test_a_notebook_is_watched_too(laboratory):
    model, data, trainer = notebook(factory(Remembering))
    for run in (trainer.fit, trainer.validate):
        with pytest.raises(UserError, match=r"Remembering opens the corpus corpus.txt \(.*test_corpus_watch.py, line"):
            run(model, datamodule=data)
        model, data, trainer = notebook(factory(Remembering))
    model, data, trainer = notebook(factory(Remembering), audit="warn")
    with pytest.warns(UserWarning, match="Remembering opens the corpus corpus.txt"):
        trainer.fit(model, datamodule=data)
    assert model.leaking
