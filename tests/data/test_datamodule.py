import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pooch
import pytest
import torch
from torch import Tensor

from llmx.data.corpora import load_corpus
from llmx.data.datamodule import TextDataModule
from llmx.data.prompts import PromptBatches, Prompts
from llmx.data.windows import Batch
from llmx.errors import UserError
from llmx.protocol import IGNORE


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(pooch, "retrieve", no_network)
    monkeypatch.setenv("LLMX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLMX_DATA_PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A corpus file of 200 different characters, so that a character tells its position."""
    path = tmp_path / "corpus.txt"
    path.write_text("".join(chr(0x100 + position) for position in range(200)), "utf-8")
    return str(path)


def counted(batches: Iterator[Batch] | Any) -> list[int]:
    return [target for batch in batches for target in batch.targets[batch.targets != IGNORE].tolist()]


def test_steps_and_split_of_tinyshakespeare(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("ab" * (1_115_394 // 2))  # its length is all that matters here
    data = TextDataModule(str(path))
    assert len(data.tokens("train")) == 1_003_854
    assert len(data.tokens("val")) == 111_540
    assert len(data.tokens("test")) == 0
    assert data.steps_per_epoch == len(data.train_dataloader()) == 15_685
    assert len(counted(data.val_dataloader())) == 111_539


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ([0.8, 0.1, 0.1], [160, 20, 20]),
        ([0.5, 0.0, 0.5], [100, 0, 100]),
        ([1.0, 0.0, 0.0], [200, 0, 0]),
        ([0.9, 0.1 - 1e-10, 0.0], [180, 20, 0]),
    ],
)
def test_splits_are_contiguous_and_cover_the_corpus(text: str, split: list[float], sizes: list[int]) -> None:
    data = TextDataModule(text, split=split)
    parts = [data.tokens("train"), data.tokens("val"), data.tokens("test")]
    assert [len(part) for part in parts] == sizes
    assert np.concatenate(parts).tolist() == list(range(200))


def test_no_window_reaches_over_the_border_of_a_split(text: str) -> None:
    data = TextDataModule(text, split=[0.6, 0.2, 0.2], window=7, batch_size=8)
    for batches, first, end in (
        (data.train_dataloader(), 0, 120),
        (data.val_dataloader(), 120, 160),
        (data.test_dataloader(), 160, 200),
    ):
        assert set(counted(batches)) == set(range(first + 1, end))
        for batch in batches:
            rows = (batch.targets != IGNORE).any(1)  # the others are padding
            assert ((batch.inputs[rows] >= first) & (batch.inputs[rows] < end)).all()


def test_random_sampling_keeps_the_steps_and_fills_every_batch(text: str) -> None:
    data = TextDataModule(text, sampling="random", window=8, batch_size=64)
    assert data.steps_per_epoch == TextDataModule(text, window=8, batch_size=64).steps_per_epoch
    assert all((batch.targets != IGNORE).all() for batch in data.train_dataloader())


def test_order_follows_the_seed_of_the_run_unless_given(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(seed: int | None) -> list[list[int]]:
        return next(iter(TextDataModule(text, seed=seed).train_dataloader())).inputs.tolist()

    assert first(None) == first(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert first(None) == first(5) != first(0)


def test_stride_of_one_is_the_founding_protocol_unless_told_otherwise(text: str) -> None:
    def validated(**kwargs: Any) -> int:
        return len(counted(TextDataModule(text, split=[0.5, 0.5, 0.0], window=8, **kwargs).val_dataloader()))

    assert validated() == validated(val_stride=4) == validated(val_stride=1, val_count="new") == 99
    assert validated(val_stride=1) == (100 - 8) * 8


def test_protocol_says_what_is_measured(text: str) -> None:
    assert TextDataModule(text, window=8, val_stride=1).protocol == {
        "corpus": text,
        "requested": text,
        "sha256": load_corpus(text).sha256,
        "characters": 200,
        "vocab_size": 200,
        "split": [0.9, 0.1, 0.0],
        "window": 8,
        "batch_size": 64,
        "sampling": "epoch",
        "val_stride": 1,
        "val_count": "all",
    }
    assert TextDataModule(text, window=8).protocol["val_stride"] == 8


def test_hyperparameters_are_plain_data(text: str, tmp_path: Path) -> None:
    data = TextDataModule(text, tokenizer={"kind": "byte"}, prompts=["a"])
    torch.save(dict(data.hparams), tmp_path / "hparams.pt")
    assert torch.load(tmp_path / "hparams.pt", weights_only=True) == dict(data.hparams)
    assert data.hparams["corpus"] == text


def test_byte_tokenizer_and_a_described_one(text: str) -> None:
    assert TextDataModule(text, tokenizer="byte").protocol["vocab_size"] == 256
    learned = TextDataModule(text)
    described = TextDataModule(text, tokenizer=learned.tokenizer.to_config())  # type: ignore[arg-type]
    assert (described.tokens("train") == learned.tokens("train")).all()


def test_tokenizer_that_does_not_fit_the_corpus_is_named(text: str) -> None:
    data = TextDataModule(text, tokenizer={"kind": "character", "vocabulary": chr(0x100)})
    with pytest.raises(UserError, match=r"data\.tokenizer does not fit .*corpus\.txt.*position 1 "):
        data.prepare()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, r"data\.window is 0"),
        ({"batch_size": 0}, r"data\.batch_size is 0"),
        ({"samples": 0}, r"data\.samples is 0"),
        ({"split": [0.9, 0.2, 0.0]}, r"data\.split"),
        ({"split": [1.1, -0.1, 0.0]}, r"data\.split"),
        ({"split": [0.9, 0.1]}, r"data\.split"),
        ({"sampling": "all"}, r"data\.sampling is 'all'"),
        ({"seed": -1}, r"data\.seed is -1"),
        ({"val_stride": 33}, r"data\.val_stride is 33.*data\.window, 32"),
        ({"val_count": "some"}, r"data\.val_count is 'some'"),
        ({"tokenizer": "word"}, r"data\.tokenizer is 'word'"),
    ],
)
def test_bad_arguments_are_refused_before_a_corpus_is_loaded(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextDataModule("no such corpus", **arguments)


@pytest.mark.parametrize(
    ("window", "split", "name", "length"), [(150, [0.5, 0.5, 0.0], "train", 100), (30, [0.9, 0.1, 0.0], "val", 20)]
)
def test_split_too_short_for_the_window_is_named(
    text: str, window: int, split: list[float], name: str, length: int
) -> None:
    with pytest.raises(UserError, match=rf"data\.window is {window}.*the {name} split has {length}"):
        TextDataModule(text, window=window, split=split).prepare()


def test_empty_splits(text: str) -> None:
    data = TextDataModule(text, split=[1.0, 0.0, 0.0])
    data.prepare()
    assert data.val_dataloader() == []
    with pytest.raises(UserError, match=r"data\.split gives the test split nothing"):
        data.test_dataloader()
    for stage in ("validate", "test"):
        with pytest.raises(UserError, match=r"data\.split gives the (val|test) split nothing"):
            data.setup(stage)


def test_substitution_is_announced_once(capsys: pytest.CaptureFixture[str]) -> None:
    data = TextDataModule("tinyshakespeare", offline_corpus="stdlib")
    data.prepare()
    data.prepare()
    notice = capsys.readouterr().err
    assert notice.count("another corpus") == 1
    assert "tinyshakespeare" in notice
    assert "stdlib" in notice
    assert (data.protocol["corpus"], data.protocol["requested"]) == ("stdlib", "tinyshakespeare")


def test_corpus_that_was_found_is_not_announced(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    TextDataModule(text, offline_corpus="stdlib", window=8).prepare()
    assert capsys.readouterr().err == ""


ABC = {"kind": "character", "vocabulary": "\nabc"}


def prompts_of(prompts: list[str] | str | None, **kwargs: Any) -> list[Prompts]:
    """The batches of prompts; there is no corpus, so that needing one would fail."""
    data = TextDataModule("tinyshakespeare", tokenizer=ABC, prompts=prompts, **kwargs)
    data.setup("predict")
    return list(data.predict_dataloader())


def test_prompts_are_grouped_by_length_and_repeated() -> None:
    batches = prompts_of(["ab", "c", "ba", "abc"], samples=2, batch_size=3)
    assert sum(len(batch.indices) for batch in batches) == 8
    for batch in batches:
        assert len(batch.indices) == len(batch.texts) == len(batch.tokens) <= 3
        assert batch.tokens.dtype == torch.int64
        for row, index, text in zip(batch.tokens, batch.indices, batch.texts, strict=True):
            assert text == ["ab", "c", "ba", "abc"][index]
            assert row.tolist() == ["\nabc".index(character) for character in text]
    assert sorted(index for batch in batches for index in batch.indices) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_ranks_share_the_batches_of_prompts() -> None:
    encoded = [("a" * length, np.zeros(length, np.uint8)) for length in (1, 2, 3, 1, 2)]
    ranks = [PromptBatches(encoded, samples=1, batch_size=1, rank=rank, world=2) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [3, 2]
    assert sorted(index for rank in ranks for batch in rank for index in batch.indices) == [0, 1, 2, 3, 4]


def test_prompts_come_from_a_list_a_file_one_string_or_a_newline(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes(b"ab\r\nca\n")
    assert [batch.texts for batch in prompts_of("prompts")] == [["ab", "ca"]]
    assert [batch.texts for batch in prompts_of("ab\nca")] == [["ab\nca"]]
    assert [batch.texts for batch in prompts_of(None)] == [["\n"]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", ""], "prompt 1 is empty"),
        ([], "empty list"),
        ("", "prompt 0 is empty"),
        (["a", "ad"], "prompt 1, 'ad': the character 'd' at position 1"),
    ],
)
def test_bad_prompts_are_named(prompts: list[str] | str, message: str) -> None:
    with pytest.raises(UserError, match=rf"data\.prompts.*{message}"):
        prompts_of(prompts)


class Recorder(pl.LightningModule):
    """Trains one number, and keeps the batches that it saw."""

    def __init__(self, save_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.save_at = save_at
        self.seen: list[list[int]] = []
        self.validated: list[int] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Batch) -> Tensor:
        self.seen.append(batch.inputs[:, 0].tolist())
        return self.weight * (batch.targets != IGNORE).sum() * batch.share

    def on_train_batch_end(self, *args: object) -> None:
        if self.trainer.global_step == self.save_at and not Path("saved.ckpt").exists():
            self.trainer.save_checkpoint("saved.ckpt")

    def validation_step(self, batch: Batch) -> None:
        self.validated += batch.targets[batch.targets != IGNORE].tolist()

    def predict_step(self, batch: Prompts) -> list[str]:
        return batch.texts


def trainer(**kwargs: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **kwargs)


@pytest.mark.parametrize("save_at", [3, 9])  # steps an epoch are 7: in the first, in the second
def test_lightning_resumes_in_the_middle_of_an_epoch(text: str, save_at: int) -> None:
    def fit(module: Recorder, ckpt_path: str | None = None) -> None:
        data = TextDataModule(text, split=[0.3, 0.7, 0.0], window=8, batch_size=8, seed=1)
        trainer(max_epochs=2, accumulate_grad_batches=2).fit(module, data, ckpt_path=ckpt_path)

    whole = Recorder(save_at)
    fit(whole)
    assert len(whole.seen) == 2 * 2 * 7
    assert sorted(whole.validated) == sorted(2 * list(range(61, 200)))
    rest = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dataloader is not resumable")
        fit(rest, "saved.ckpt")
    assert rest.seen == whole.seen[2 * save_at :]
    torch.testing.assert_close(rest.weight, whole.weight, rtol=0, atol=0)  # the same additions in the same order
    # each step subtracts the learning rate times a gradient of 1: the mean of ones, in ragged batches too
    torch.testing.assert_close(whole.weight.item(), -0.1 * 14, rtol=1e-5, atol=0)


def test_lightning_skips_an_empty_validation_split(text: str) -> None:
    module = Recorder()
    trainer(max_epochs=1).fit(module, TextDataModule(text, split=[1.0, 0.0, 0.0], batch_size=64))
    assert len(module.seen) == 3
    assert module.validated == []


def test_lightning_predicts_without_a_corpus() -> None:
    data = TextDataModule("tinyshakespeare", tokenizer=ABC, prompts=["ab", "c"])
    assert trainer().predict(Recorder(), data) == [["c"], ["ab"]]
