"""Text as a LightningDataModule: corpus, tokenizer, split, windows."""

import os
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from llmx.data.corpora import NAMED, Corpus, load_corpus
from llmx.data.prompts import PromptBatches, encoded_prompts
from llmx.data.repeated import repeated_share
from llmx.data.token_files import TokenCorpus, TokenStream, is_token_folder, open_tokens
from llmx.data.tokenizers import (
    ByteTokenizer,
    CharacterTokenizer,
    Tokenizer,
    cached_tokens,
    token_cache,
    tokenizer_from_config,
)
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

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class TextDataModule(LightningDataModule):
    """The text that a language model learns from and is measured on.

    The split is contiguous and comes before the windows, so no window reaches from one split into another.

    Args:
        corpus: tinyshakespeare, text8, enwik8, stdlib (the source of Python's standard library), a text file, a folder
            of them, or a folder of token files (llmx.data.token_files).
        root: The folder of named corpora; $LLMX_DATA_PATH and the cache folder come after it.
        offline_corpus: The corpus to use if a named one is neither on disk nor downloadable; null: stop.
        tokenizer: character (learned from the corpus), byte, or a tokenizer's description as a checkpoint has it; null:
            character, but byte for enwik8, and for token files their own.
        split: The fractions of the corpus for training, validation and test, in this order; null: 0.9, 0.1, 0.0, but
            0.9, 0.05, 0.05 for text8 and enwik8, and for token files at most 10 million tokens for validation.
        window: Tokens a window.
        batch_size: Windows a step, over all devices and accumulated micro-batches.
        sampling: epoch takes every window once an epoch in random order; random draws windows independently.
        seed: Of the order of the windows; null: the run's own seed.
        val_stride: Tokens between the starts of validation windows; null: window, so that they do not overlap.
        val_count: new counts each token once, with the longest context that the stride gives; all counts all targets
            of all full windows; null: new, or all if val_stride is 1.
        prompts: Texts for predict to continue: a list, a UTF-8 file with one prompt a line, or one prompt; null: a
            newline.
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
        self.save_hyperparameters(logger=False)
        _check_arguments(self.hparams)
        self.corpus = corpus
        self.root = root
        self.offline_corpus = offline_corpus
        self._tokenizer = tokenizer
        self._split = split
        self.window = window
        self.batch_size = batch_size
        self.sampling = sampling
        self.seed = seed
        self.val_stride = window if val_stride is None else val_stride
        self.val_count: Literal["new", "all"] = val_count or ("all" if val_stride == 1 else "new")
        self.prompts = prompts
        self.samples = samples

    @cached_property
    def source(self) -> Corpus | TokenCorpus:
        """The corpus of this run, loaded at first use. If it stands in for another, a notice says so then."""
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
                written = f"the one that the token files of {self.source.source} were written with"
                raise UserError(f"data.tokenizer is not {written}; leave it out")
            return self.source.tokens
        try:
            return cached_tokens(self.source, self.tokenizer)
        except UserError as error:
            raise UserError(f"data.tokenizer does not fit {self.source.source}: {error}") from None

    @property
    def split(self) -> list[float]:
        """The fractions of the corpus for training, validation and test."""
        return list(self.source.split if self._split is None else self._split)

    @property
    def files(self) -> list[Path]:
        """The files with the text or its tokens: those of the corpus, and of every encoded corpus in the cache."""
        return [*self.source.files, *token_cache()]

    def tokens(self, split: Split) -> np.ndarray | TokenStream:
        """The token ids of a split, (L,), read-only; np.asarray reads those of token files into memory."""
        return self._encoded[slice(*self._bounds(split))]

    def share_within(self, split: Split, fraction: float) -> float:
        """The share of a split that lies in the first `fraction` of the corpus, from 0 to 1."""
        start, end = self._bounds(split)
        return max(0, min(end, int(fraction * len(self._encoded))) - start) / max(1, end - start)

    def share_repeated(self) -> float:
        """The share of the validation split that stands word for word in the training split (llmx.data.repeated)."""
        return repeated_share(self.tokens("val"), self.tokens("train"))

    def _bounds(self, split: Split) -> tuple[int, int]:
        length, fractions = len(self._encoded), self.split
        last = max(index for index, fraction in enumerate(fractions) if fraction > 0)  # takes what rounding leaves
        ends = [length if index >= last else int(sum(fractions[: index + 1]) * length) for index in range(3)]
        index = SPLITS.index(split)
        return (0, *ends)[index], ends[index]

    def beginning(self, most: int = 2**20) -> Tensor:
        """The first token ids of the training split, (L,): the split may be too large to hold."""
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
        """Optimizer steps an epoch, for any number of devices and accumulated batches."""
        return self.sampler.steps_per_epoch

    @property
    def protocol(self) -> dict[str, Any]:
        """How the run is trained and measured, as plain data. Runs compare only if it is the same."""
        settings = ("split", "window", "batch_size", "sampling", "val_stride", "val_count")
        return {
            "corpus": self.source.name,
            "requested": self.source.requested,
            "sha256": self.source.sha256,
            "characters": self.source.characters,
            "vocab_size": self.tokenizer.vocab_size,
        } | {name: getattr(self, name) for name in settings}

    def prepare(self) -> None:
        """Loads and encodes the corpus and checks that it can be trained on, before anything is written. Raises
        UserError if the corpus cannot be had or encoded, or a split is too short for the window."""
        count_windows(len(self.tokens("train")), self.window, "train")
        if len(self.tokens("val")):
            count_windows(len(self.tokens("val")), self.window, "val")

    def prepare_data(self) -> None:
        """Lightning calls this on one process first; the others find its downloads and encoded tokens."""
        self.setup(None if self.trainer is None else self.trainer.state.fn)

    def setup(self, stage: str | None = None) -> None:
        """Fails early if the stage lacks something. Prediction needs the tokenizer only."""
        if stage == "predict":
            self.predict_dataloader()
        elif stage in ("validate", "test"):
            self._evaluation("val" if stage == "validate" else "test")
        else:
            self.prepare()

    def train_dataloader(self) -> TrainingBatches:
        trainer, data = self.trainer, (self.tokens("train"), self.window, self.sampler)
        if trainer is None:
            return TrainingBatches(*data, lambda: 0)
        accumulate = trainer.accumulate_grad_batches
        return TrainingBatches(*data, lambda: trainer.global_step, accumulate, *self._rank_and_world_size)

    def val_dataloader(self) -> EvaluationBatches | list[EvaluationBatches]:
        """The whole validation split; an empty list, which Lightning skips, if the split is empty."""
        return self._evaluation("val") if len(self.tokens("val")) else []

    def test_dataloader(self) -> EvaluationBatches:
        return self._evaluation("test")

    def predict_dataloader(self) -> PromptBatches:
        """The prompts, each `samples` times. Raises UserError for a bad prompt."""
        encoded = encoded_prompts(self.prompts, self.tokenizer)
        return PromptBatches(encoded, self.samples, self.batch_size, *self._rank_and_world_size)

    def _evaluation(self, split: Split) -> EvaluationBatches:
        tokens = self.tokens(split)
        if not len(tokens):
            raise UserError(f"data.split gives the {split} split nothing: {self.split}")
        count_windows(len(tokens), self.window, split)
        return EvaluationBatches(
            tokens, self.window, self.batch_size, self.val_stride, self.val_count, *self._rank_and_world_size
        )

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Raises UserError for an argument that is wrong for any corpus."""
    for key in ("window", "batch_size", "samples"):
        if given[key] < 1:
            raise UserError(f"data.{key} is {given[key]}, but must be at least 1")
    split = given["split"]
    if split is not None and (len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-9):
        needed = "three fractions, for training, validation and test, that are not negative and add up to 1"
        raise UserError(f"data.split is {split}, but must be {needed}")
    if given["seed"] is not None and given["seed"] < 0:
        raise UserError(f"data.seed is {given['seed']}, but must not be negative")
    if given["val_stride"] is not None:
        check_stride(given["val_stride"], given["window"])
    if given["sampling"] not in ("epoch", "random"):
        raise UserError(f"data.sampling is {given['sampling']!r}, but must be epoch or random")
    if given["val_count"] not in ("new", "all", None):
        raise UserError(f"data.val_count is {given['val_count']!r}, but must be new, all or null")
    tokenizer = given["tokenizer"]
    if isinstance(tokenizer, str) and tokenizer not in ("character", "byte"):
        raise UserError(f"data.tokenizer is {tokenizer!r}, but must be character, byte or a tokenizer's description")


@rank_zero_only
def _announce_substitution(corpus: Corpus) -> None:
    notice = Text(
        f"{corpus.requested} is neither on disk nor downloadable. This run uses {corpus.name} instead "
        f"(data.offline_corpus): its losses do not compare with those on {corpus.requested}."
    )
    rich.print(Panel(notice, title="another corpus", border_style="red"), file=sys.stderr)
