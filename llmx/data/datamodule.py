"""Text as a LightningDataModule: corpus, tokenizer, split, windows."""

import os
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import rich
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from llmx.data.corpora import NAMED, Corpus, load_corpus
from llmx.data.token_files import TokenCorpus, TokenStream, is_token_folder, open_tokens
from llmx.data.tokenizers import ByteTokenizer, CharacterTokenizer, Tokenizer, cached_tokens, tokenizer_from_config
from llmx.data.windows import (
    EpochWindows,
    EvaluationBatches,
    KeyedEpochWindows,
    RandomWindows,
    TrainingBatches,
    WindowSampler,
    check_stride,
    count_windows,
)
from llmx.errors import UserError
from llmx.runs.archive import read_archive

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Prompts(NamedTuple):
    """Prompts of equal length, to be continued.

    tokens:   (B, T) int64
    indices:  the number of each row's prompt
    texts:    the prompts themselves
    """

    tokens: Tensor
    indices: list[int]
    texts: list[str]


class PromptBatches:
    """Prompts in batches of equal token length, so that none needs padding; a rank takes every world_size-th batch."""

    def __init__(self, encoded: list[tuple[str, np.ndarray]], samples: int, batch_size: int, rank: int, world: int):
        rows = [(index, text, ids) for index, (text, ids) in enumerate(encoded) for _ in range(samples)]
        batches = []
        for _, group in groupby(sorted(rows, key=lambda row: len(row[2])), key=lambda row: len(row[2])):
            same = list(group)
            batches += [same[first : first + batch_size] for first in range(0, len(same), batch_size)]
        self.batches = batches[rank::world]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Prompts]:
        for batch in self.batches:
            indices, texts, ids = zip(*batch, strict=True)
            yield Prompts(torch.from_numpy(np.stack(ids).astype(np.int64)), list(indices), list(texts))


class TextDataModule(LightningDataModule):
    """The text that a language model is trained and measured on.

    The split is contiguous, and made before windows are cut, so that no window reaches from one split into another.

    Args:
        corpus: tinyshakespeare, text8, enwik8, stdlib (the source of Python's standard library), a text file, a folder
            of them, or a folder of token files (llmx.data.token_files).
        root: The folder of named corpora; $LLMX_DATA_PATH and the cache folder are searched after it.
        offline_corpus: What to train on where a named corpus can be neither found nor downloaded; null: stop.
        tokenizer: character (learned from the corpus), byte, or the description of a tokenizer as a checkpoint has it;
            null: character, but byte for enwik8, and for token files their own.
        split: The fractions of the corpus for training, validation and test, in this order; null: 0.9, 0.1, 0.0, but
            0.9, 0.05, 0.05 for text8 and enwik8, and of token files at most 10 million tokens for validation.
        window: Tokens a window.
        batch_size: Windows a step, over all devices and accumulated micro-batches.
        sampling: epoch takes every window once an epoch in random order; random draws windows independently.
        seed: Of the order of the windows; null: the run's own seed.
        val_stride: Tokens between the starts of validation windows; null: window, so that they do not overlap.
        val_count: new counts each token once, with the longest context that the stride gives; all counts all targets
            of all full windows; null: new, or all where val_stride is 1.
        prompts: What predict continues: a list, a UTF-8 file with one prompt a line, or one prompt; null: a newline.
        samples: How many continuations of each prompt.
    """

    def __init__(
        self,
        corpus: str = "tinyshakespeare",
        root: str = "data",
        offline_corpus: str | None = None,
        tokenizer: str | dict[str, str] | None = None,
        split: list[float] | None = None,
        window: int = 32,
        batch_size: int = 64,
        sampling: Literal["epoch", "random"] = "epoch",
        seed: int | None = None,
        val_stride: int | None = None,
        val_count: Literal["new", "all"] | None = None,
        prompts: list[str] | str | None = None,
        samples: int = 1,
    ):
        super().__init__()
        for key, value in {"window": window, "batch_size": batch_size, "samples": samples}.items():
            if value < 1:
                raise UserError(f"data.{key} is {value}, but must be at least 1")
        if split is not None and (len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-9):
            raise UserError(
                f"data.split is {split}, but must be three fractions, for training, validation and test, that are "
                "not negative and add up to 1"
            )
        if sampling not in ("epoch", "random"):
            raise UserError(f"data.sampling is {sampling!r}, but must be epoch or random")
        if seed is not None and seed < 0:
            raise UserError(f"data.seed is {seed}, but must not be negative")
        if val_stride is not None:
            check_stride(val_stride, window)
        if val_count not in ("new", "all", None):
            raise UserError(f"data.val_count is {val_count!r}, but must be new, all or null")
        if isinstance(tokenizer, str) and tokenizer not in ("character", "byte"):
            raise UserError(
                f"data.tokenizer is {tokenizer!r}, but must be character, byte or a tokenizer's description"
            )
        self.save_hyperparameters(logger=False)
        self.corpus = corpus
        self.root = root
        self.offline_corpus = offline_corpus
        self._split = split
        self.window = window
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed
        self.val_stride = window if val_stride is None else val_stride
        self.val_count: Literal["new", "all"] = val_count or ("all" if val_stride == 1 else "new")
        self.prompts = prompts
        self.samples = samples
        self._tokenizer = tokenizer

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **changes: Any) -> "TextDataModule":  # type: ignore[override]
        """The data that a checkpoint's run was trained on; nothing in the file is executed.

        Raises:
            UserError: The file is damaged, holds more than tensors and plain data, or is none of a TextDataModule.
        """
        checkpoint = read_archive(Path(checkpoint_path))
        try:
            return cls(**{**checkpoint["datamodule_hyper_parameters"], **changes})
        except (KeyError, TypeError) as error:
            raise UserError(f"ckpt_path: {checkpoint_path} does not fit {cls.__name__}: {error}") from error

    @cached_property
    def source(self) -> Corpus | TokenCorpus:
        """The corpus really used. Loaded at first use; a substitution is announced then."""
        if self.corpus not in NAMED and is_token_folder(self.corpus):
            return open_tokens(self.corpus)
        corpus = load_corpus(self.corpus, self.root, self.offline_corpus)
        if corpus.substituted:
            _announce_substitution(corpus)
        return corpus

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if isinstance(self._tokenizer, dict):
            return tokenizer_from_config(self._tokenizer)
        if isinstance(self.source, TokenCorpus):
            return self.source.tokenizer
        own = self._tokenizer or self.source.tokenizer
        return ByteTokenizer() if own == "byte" else CharacterTokenizer.from_text(self.source.text)

    @cached_property
    def _encoded(self) -> np.ndarray | TokenStream:
        if isinstance(self.source, TokenCorpus):
            own = self.source.tokenizer.to_config()
            if self._tokenizer not in (None, own, own["kind"]):
                raise UserError(
                    f"data.tokenizer is not the one that the token files of {self.source.source} were written with; "
                    "leave it out"
                )
            return self.source.tokens
        try:
            return cached_tokens(self.source, self.tokenizer)
        except UserError as error:
            raise UserError(f"data.tokenizer does not fit {self.source.source}: {error}") from None

    @property
    def split(self) -> list[float]:
        """The fractions of the corpus for training, validation and test."""
        return list(self.source.split if self._split is None else self._split)

    def tokens(self, split: Split) -> np.ndarray | TokenStream:
        """The token ids of a split, (L,), read-only; np.asarray reads those of token files into memory."""
        return self._encoded[slice(*self._bounds(split))]

    def share_within(self, split: Split, fraction: float) -> float:
        """How much of a split lies in the first `fraction` of the corpus, from 0 to 1."""
        start, end = self._bounds(split)
        return max(0, min(end, int(fraction * len(self._encoded))) - start) / max(1, end - start)

    def _bounds(self, split: Split) -> tuple[int, int]:
        length, fractions = len(self._encoded), self.split
        last = max(index for index, fraction in enumerate(fractions) if fraction > 0)  # takes what rounding leaves
        ends = [length if index >= last else int(sum(fractions[: index + 1]) * length) for index in range(3)]
        index = SPLITS.index(split)
        return ends[index - 1] if index else 0, ends[index]

    def beginning(self, most: int = 2**20) -> Tensor:
        """At most so many token ids of the training split, (L,), which may be too large to hold."""
        return torch.from_numpy(np.asarray(self.tokens("train")[:most], np.int64))

    @property
    def sampler(self) -> WindowSampler:
        windows = count_windows(len(self.tokens("train")), self.window, "train")
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        if self.sampling == "random":
            return RandomWindows(windows, self.batch_size, seed)
        kind = EpochWindows if windows <= EpochWindows.most else KeyedEpochWindows
        return kind(windows, self.batch_size, seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch, whatever the number of devices and of accumulated batches."""
        return self.sampler.steps_per_epoch

    @property
    def protocol(self) -> dict[str, Any]:
        """What was trained and measured on, as plain data: runs compare only where it is the same."""
        return {
            "corpus": self.source.name,
            "requested": self.source.requested,
            "sha256": self.source.sha256,
            "characters": self.source.characters,
            "vocab_size": self.tokenizer.vocab_size,
            "split": self.split,
            "window": self.window,
            "batch_size": self.batch_size,
            "sampling": self.sampling,
            "val_stride": self.val_stride,
            "val_count": self.val_count,
        }

    def prepare(self) -> None:
        """Loads and encodes the corpus, and checks that it can be trained on: fails before anything is written.

        Raises:
            UserError: The corpus cannot be had or encoded, or a split is too short for the window.
        """
        count_windows(len(self.tokens("train")), self.window, "train")
        if len(self.tokens("val")):
            count_windows(len(self.tokens("val")), self.window, "val")

    def prepare_data(self) -> None:
        """Lightning calls this on one process before the others go on: they find what it downloaded and encoded."""
        self.setup(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Fails early where the stage lacks something. Prediction needs the tokenizer only."""
        if stage == "predict":
            self.predict_dataloader()
        elif stage == "validate":
            self._evaluation("val")
        elif stage == "test":
            self._evaluation("test")
        else:
            self.prepare()

    def train_dataloader(self) -> TrainingBatches:
        trainer = self.trainer
        return TrainingBatches(
            self.tokens("train"),
            self.window,
            self.sampler,
            start_step=lambda: 0 if trainer is None else trainer.global_step,
            accumulate=1 if trainer is None else trainer.accumulate_grad_batches,
            rank=self._rank,
            world_size=self._world_size,
        )

    def val_dataloader(self) -> EvaluationBatches | list[EvaluationBatches]:
        """The whole validation split; nothing, which Lightning skips, where it is empty."""
        return self._evaluation("val") if len(self.tokens("val")) else []

    def test_dataloader(self) -> EvaluationBatches:
        return self._evaluation("test")

    def predict_dataloader(self) -> PromptBatches:
        """The prompts, each `samples` times.

        Raises:
            UserError: There is no prompt, or one is empty or has a character outside the vocabulary.
        """
        encoded = []
        for number, prompt in enumerate(self._prompts()):
            if not prompt:
                raise UserError(f"data.prompts: prompt {number} is empty; give it at least one character")
            try:
                encoded.append((prompt, self.tokenizer.encode(prompt)))
            except UserError as error:
                raise UserError(f"data.prompts: prompt {number}, {prompt!r:.100}: {error}") from None
        return PromptBatches(encoded, self.samples, self.batch_size, self._rank, self._world_size)

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    @property
    def _world_size(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _evaluation(self, split: Split) -> EvaluationBatches:
        tokens = self.tokens(split)
        if not len(tokens):
            raise UserError(f"data.split gives the {split} split nothing: {self.split}")
        count_windows(len(tokens), self.window, split)
        return EvaluationBatches(
            tokens, self.window, self.batch_size, self.val_stride, self.val_count, self._rank, self._world_size
        )

    def _prompts(self) -> list[str]:
        if self.prompts is None:
            return ["\n"]
        if isinstance(self.prompts, str):
            if not os.path.isfile(self.prompts):
                return [self.prompts]
            try:
                return Path(self.prompts).read_text("utf-8").removesuffix("\n").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"data.prompts: {self.prompts} cannot be read as UTF-8 text: {error}") from None
        if not self.prompts:
            raise UserError("data.prompts is an empty list: give at least one prompt, or null for a newline")
        return self.prompts


@rank_zero_only
def _announce_substitution(corpus: Corpus) -> None:
    notice = Text(
        f"{corpus.requested} is on no disk and cannot be downloaded. This run uses {corpus.name} instead "
        f"(data.offline_corpus): its losses do not compare with those on {corpus.requested}."
    )
    rich.print(Panel(notice, title="another corpus", border_style="red"), file=sys.stderr)
