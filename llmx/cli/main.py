"""The command line: LightningCLI over the laboratory's one LightningModule and one LightningDataModule.

What a user gives wins in this order: command line, the run that `--ckpt_path` names, config file, defaults. Whatever
is wrong with it becomes one message and exit code 2; nothing is written before the configuration is known to build.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import rich
import torch
import torch.distributed as dist
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.multiprocessing.spawn import ProcessException
from torch.optim import Optimizer

from llmx.cli.diagnosis import explain
from llmx.cli.failures import lost, too_large
from llmx.cli.preflight import check_window
from llmx.config.arguments import option, replaced, root_of, without_trust
from llmx.config.bases import config_text, read_config, with_bases, with_list_entries
from llmx.config.factories import build, check_imports, import_collection, to_config
from llmx.costs.budget import Budget, Plan, budget
from llmx.costs.describe import Description
from llmx.costs.from_config import describe_config
from llmx.costs.matching import match
from llmx.data.datamodule import Split, TextDataModule
from llmx.errors import UserError
from llmx.protocol import CountingNetwork, Network
from llmx.runs.archive import read_checkpoint
from llmx.runs.folder import CONFIG, RUNS, is_best, last_checkpoint, newest_run, run_of
from llmx.runs.predictions import write_predictions
from llmx.training.callbacks import ProgressBar
from llmx.training.checkpoints import CheckpointFiles
from llmx.training.fastpath import fast_precision
from llmx.training.logger import RunLogger, run_folder
from llmx.training.maps import MixerMaps
from llmx.training.metrics import bits, perplexity
from llmx.training.module import LanguageModel
from llmx.training.optimizers import parameter_groups
from llmx.training.record import check_same_data
from llmx.training.run import run_callbacks
from llmx.training.saving import StopOnSignal
from llmx.training.trainer import Trainer

GROUPS: dict[str, type] = {"model": LanguageModel, "data": TextDataModule}
OTHER_VERBS = {  # modules with a run(arguments) -> exit code; sweep's also takes `execute`
    "compare": "llmx.comparison.command",
    "sweep": "llmx.sweep.command",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a write to a full disk raises, without the file's name


def main(args: list[str] | None = None) -> int:
    """Runs one command, `sys.argv` by default.

    Returns the exit code: 0, 1 where `audit` found a fault or `describe --match` no match, 2 for bad input.

    Raises:
        SystemExit: with 130 for SIGINT and 143 for SIGTERM; a fit is saved before.
    """
    # the working directory is importable: one file there and one YAML make a new architecture
    sys.path.insert(0, os.getcwd())
    arguments = sys.argv[1:] if args is None else args
    _quiet()
    former = _leave_on_signals()
    try:
        if arguments and arguments[0] in OTHER_VERBS:
            run = importlib.import_module(OTHER_VERBS[arguments[0]]).run
            return run(arguments[1:], execute) if arguments[0] == "sweep" else run(arguments[1:])
        return execute(arguments).exit_code
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}"
    except (ProcessException, MemoryError, RuntimeError) as error:
        known = too_large(error) or lost(error)
        if known is None:
            raise
        message = known
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    sys.stdout.flush()
    sys.stderr.write(f"error: {message}\n")
    return 2


def execute(
    arguments: list[str], callbacks: Sequence[Callback] = (), dry: bool = False, command: list[str] | None = None
) -> CLI:
    """Runs one of the trainer's verbs.

    Args:
        arguments: the command line, verb first.
        callbacks: what the trainer of a fit has besides its own.
        dry: reads the arguments and nothing more.
        command: what the run says it comes from; if not given, the command of this process.

    Raises:
        UserError: for whatever is wrong with the arguments.
        OSError: for a file that cannot be read or written.
    """
    try:
        return CLI(with_list_entries(with_bases(arguments)), callbacks, dry, command)
    except MisconfigurationException as error:  # Lightning's word for flags that do not go together
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _explained(error: ParserError, arguments: list[str]) -> str:
    options = ["config", "seed_everything", "vocab_size", "trust", "ckpt_path", "length", "format"]
    options += ["match", "to", "by", "peak_flops", "bandwidth"]
    options += ["weights_only", "verbose", "return_predictions", "help"]
    verbs = [*CLI.subcommands(), *OTHER_VERBS]
    return explain(str(error), arguments, verbs, {**GROUPS, "trainer": Trainer}, options)


class ParserError(Exception):
    """What the parser said, on its way to being explained."""


class Parser(LightningArgumentParser):
    """A parser that raises what it has to say."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ParserError(message)


class CLI(LightningCLI):
    """fit, validate, test, predict, audit, describe."""

    def __init__(
        self,
        arguments: list[str],
        callbacks: Sequence[Callback] = (),
        dry: bool = False,
        command: list[str] | None = None,
    ):
        self.exit_code = 0
        self.command = command
        self.callbacks = callbacks
        self.dry = dry
        self.run: Path | None = None  # the run that --ckpt_path belongs to
        self.chosen = False  # whether its checkpoint is the best of several by its validation loss
        import_collection()
        verbs = self.subcommands()
        if arguments and arguments[0] in verbs:  # making the parsers of the others takes most of the time of all this
            self.subcommands = lambda: {arguments[0]: verbs[arguments[0]]}  # type: ignore[method-assign]
        arguments = with_list_entries(self._with_run(arguments))
        try:
            super().__init__(
                LanguageModel,
                TextDataModule,
                trainer_class=Trainer,
                trainer_defaults={
                    "max_epochs": -1,
                    "check_val_every_n_epoch": None,
                    "val_check_interval": 500,
                    "enable_model_summary": False,  # the composition table says more
                    "use_distributed_sampler": False,
                },
                seed_everything_default=1,
                parser_class=Parser,
                parser_kwargs={"epilog": f"Beside these: {' and '.join(OTHER_VERBS)}, each with its own --help."},
                save_config_callback=None,  # it would write before the network is known to build; see RunRecord
                auto_configure_optimizers=False,
                args=arguments,
            )
        except ParserError as error:
            raise UserError(_explained(error, arguments)) from error

    # ----------------------------------------------------------------------------------------------------- parsing
    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "audit": {"model", "datamodule"}, "describe": {"model"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "describe":
            parser.add_argument("--ckpt_path", type=str | None, help="A checkpoint whose network is described.")
            parser.add_argument(
                "--match",
                type=Literal["parameters", "flops"],
                help="Print what makes this config cost as much as that of --to, as a config to be given after it: the "
                "parameters by a size of the network, or the FLOPs of the whole training by the number of steps.",
            )
            parser.add_argument("--to", type=str | None, help="The config that --match matches.")
            parser.add_argument(
                "--by",
                type=str | None,
                help="The size that --match varies, such as model.network.dim; by default the hidden width of the "
                "feed-forwards, else dim. A key may be left out up to its end, and then stands for all that end so.",
            )
            parser.add_argument(
                "--peak_flops",
                type=float | None,
                help="FLOPs a second of a device. With --trainer.devices: the least time of a step's arithmetic.",
            )
            parser.add_argument(
                "--bandwidth",
                type=float | None,
                help="Bytes a second that a device sends. With --trainer.devices: the least time of communication.",
            )
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_argument(
            "--vocab_size",
            type=int | None,
            help="Tokens in the vocabulary, where it is declared: describe then reads no corpus, and every other "
            "command refuses a tokenizer of another size.",
        )
        # taken out of the command line before it is parsed: no config can trust by itself
        parser.add_argument(
            "--trust",
            type=str | None,
            help="Modules of your own, separated by commas, that the checkpoint of --ckpt_path may use.",
        )
        # both come from the data
        parser.add_class_arguments(LanguageModel, "model", fail_untyped=False, skip={"tokenizer", "window"})
        parser.add_class_arguments(TextDataModule, "data")
        # the parser cannot write partials into a config file, so it gets the same defaults as data
        defaults = inspect.signature(LanguageModel).parameters
        parser.set_defaults({f"model.{key}": to_config(defaults[key].default) for key in ("optimizer", "schedule")})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without Lightning's warning that sys.argv exists too
        for group in (*GROUPS, "trainer"):
            if not isinstance(self.config[self.config.subcommand].get(group), Namespace):
                raise UserError(f"{group}: give keys and values below it, or leave it out")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyperparameters beat the command line; see `_with_run` instead."""

    def _with_run(self, arguments: list[str]) -> list[str]:
        """The arguments, with the configuration of the run that --ckpt_path names put before what they say."""
        arguments = without_trust(arguments)
        path = option(arguments, "--ckpt_path")
        if path is None or not arguments or arguments[0] not in self.subcommands():
            return arguments
        if path == "last":
            path = str(newest_run(root_of(arguments)))
            arguments = replaced(arguments, "--ckpt_path", path)
        self.checkpoint = read_checkpoint(path)
        resumable = {"optimizer_states", "lr_schedulers"} <= self.checkpoint.keys()
        if arguments[0] == "fit" and not (resumable and "fit_loop" in self.checkpoint.get("loops", {})):
            raise UserError(
                f"ckpt_path: {path} holds weights alone, which --model.warm_start takes, and no state of a run"
            )
        self.chosen, self.run = is_best(path), run_of(path)
        if option(arguments, "--config") or option(arguments, "-c"):
            return arguments
        config = self.run / CONFIG
        if arguments[0] == "fit" and config.is_file():
            content = read_config(config)
            for group in ("model", "trainer"):  # all of the data's is plain
                check_imports(content.get(group), f"{config}: {group}")
            return [arguments[0], "--config", config_text(content), *arguments[1:]]
        model = dict(self.checkpoint["hyper_parameters"])
        data = self.checkpoint.get("datamodule_hyper_parameters")
        if data is None or not {"tokenizer", "window"} <= model.keys():
            raise UserError(f"ckpt_path: {path} is not a checkpoint of a LanguageModel and its TextDataModule")
        del model["tokenizer"], model["window"]
        content = {"model": model, "data": dict(data)}
        check_imports(model, f"ckpt_path: {path}")
        try:
            return [arguments[0], "--config", config_text(content), *arguments[1:]]
        except (TypeError, ValueError) as error:
            raise UserError(f"ckpt_path: {path}: its settings are not plain data: {error}") from error

    # ------------------------------------------------------------------------------------------------ construction
    def _add_instantiators(self) -> None:
        """Model and data are built from the parsed configuration itself, for checkpoints keep it as plain data."""
        for cls in (LanguageModel, TextDataModule):
            self.parser.add_instantiator(lambda *_, **__: None, cls, subclasses=False)

    def instantiate_classes(self) -> None:
        if self.dry:
            return
        settings = self.config[self.subcommand]
        verb = self.subcommand
        self._check_settings(settings)
        data = _plain(settings.data)
        if self.run is not None:
            data["tokenizer"] = self.checkpoint["hyper_parameters"]["tokenizer"]
        self.datamodule = TextDataModule(**data)
        if verb == "describe":
            return  # the rest would cost time, and the memory of the network
        if settings.vocab_size not in (None, self.datamodule.tokenizer.vocab_size):
            raise UserError(
                f"vocab_size: {settings.vocab_size} is declared, but the tokenizer of the data has "
                f"{self.datamodule.tokenizer.vocab_size}; leave vocab_size out, or give a tokenizer of that size"
            )
        if verb == "fit" and self.run is not None:
            check_same_data(self.run, self.datamodule)
        if verb != "predict":
            self.datamodule.prepare()
        # a sharded network without an audit is never whole: LanguageModel.configure_model builds it
        never_whole = _sharding(settings.trainer.strategy) and settings.model.audit == "off"
        with torch.device("meta") if never_whole else nullcontext():
            self.model = LanguageModel(
                **_plain(settings.model), tokenizer=self.datamodule.tokenizer, window=self.datamodule.hparams["window"]
            )
        if _sharding(settings.trainer.strategy):
            self._check_shards()
        if self.run is not None:
            self._check_same_network()
        if not never_whole:
            check_window(self.model.network, self.model.window)
        self._let_it_count()
        if verb == "fit":
            self.model.audit_causality(self.datamodule)  # before there is a run folder
        try:
            self.config_init = self.parser.instantiate_classes(self.config)  # of the trainer; see _add_instantiators
            self.trainer = self.instantiate_trainer(**self._trainer_arguments(settings.trainer))
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckpointFiles()
        if verb == "fit" and self._counts and self.trainer.world_size > 1:
            raise UserError("trainer.devices: this network counts, which one process does; give 1")
        if verb == "fit":
            self.datamodule.trainer = self.trainer
            next(iter(self.datamodule.train_dataloader()))  # devices and accumulation divide it, and memory holds it
            self.model.trainer, self.trainer.datamodule = self.trainer, self.datamodule  # type: ignore[attr-defined]
            self.model.configure_optimizers()  # which Lightning does only in a run that has begun
            if self.trainer.strategy.launcher is None:  # else in each process
                self.model.audit_run()
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, MixerMaps):
                    callback.check(self.model)
                if isinstance(callback, WeightAveraging) and _sharding(settings.trainer.strategy):
                    raise UserError("trainer.callbacks: a sharded network is not averaged, for its average is whole")

    def _check_shards(self) -> None:
        """Before other processes are started, and before there is a run folder."""
        whole = next((name for name, value in self.model.network.named_parameters() if not value.ndim), None)
        if whole is not None:
            raise UserError(f"trainer.strategy: this network cannot be sharded: {whole} has no dimensions")

    @property
    def _counts(self) -> bool:
        return isinstance(self.model.network, CountingNetwork)

    def _let_it_count(self) -> None:
        """Before the audit: of a network that has not counted it would say nothing."""
        if not self._counts or self.subcommand not in ("fit", "audit"):
            return
        if self.run is None:
            self.model.learn(self.datamodule)
        else:
            self.model.load_state_dict(self.checkpoint["state_dict"])

    def _check_settings(self, settings: Any) -> None:
        """What the parser lets pass and nothing further on would say clearly."""
        for group, cls in GROUPS.items():
            for name, parameter in inspect.signature(cls).parameters.items():
                if name in settings[group] and settings[group][name] is None and parameter.default is not None:
                    raise UserError(f"{group}.{name}: null is not a value for it")
        trainer = settings.trainer
        if self.subcommand == "fit" and trainer.max_steps == 0:
            raise UserError("trainer.max_steps: 0 leaves nothing to train; give the number of optimizer steps")
        if self.subcommand == "fit" and trainer.max_steps < 0 and (trainer.max_epochs or -1) < 0:
            raise UserError("trainer.max_steps: give the number of optimizer steps (or trainer.max_epochs)")
        if trainer.accumulate_grad_batches < 1:
            raise UserError(f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} is below 1")
        if trainer.val_check_interval == 0 and trainer.check_val_every_n_epoch is None:
            raise UserError(
                "trainer.val_check_interval: 0 is no number of steps; trainer.limit_val_batches 0 switches off"
            )
        if self.subcommand == "predict" and self.run is None:
            raise UserError("ckpt_path: predict needs a checkpoint, --ckpt_path RUN/checkpoints/last.ckpt")

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def _trainer_arguments(self, trainer: Any) -> dict[str, Any]:
        """What differs from the user's trainer settings: callbacks, logger, and steps counted in optimizer steps."""
        fit = self.subcommand == "fit"
        self.trainer_defaults["callbacks"] = self._callbacks(trainer) if fit else []
        if trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(ProgressBar())
        changes: dict[str, Any] = {} if fit else {"enable_checkpointing": False}
        if trainer.logger in (None, True):
            changes["logger"] = self._logger(trainer) if fit else False
        if trainer.precision is None and self.subcommand != "predict":  # sampling is faster in fp32
            changes["precision"] = self._precision(trainer.accelerator)
        # Lightning counts batches here; a run should validate at the same steps however they are accumulated
        if fit and isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch is None:
            changes["val_check_interval"] = trainer.val_check_interval * trainer.accumulate_grad_batches
        if trainer.strategy == ModelParallelStrategy.__name__:  # Lightning has no short name for it
            changes["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
        if fit and self._counts and trainer.devices == "auto":
            changes["devices"] = 1
        return changes

    def _precision(self, accelerator: str) -> Any:
        """That of the run, so that its numbers come out again; else what is fast here."""
        held = self.checkpoint.get("llmx", {}).get("precision") if self.run is not None else None
        return held or fast_precision(accelerator)

    def _callbacks(self, trainer: Any) -> list[Callback]:
        config = self._parser("fit").dump(self.config["fit"], skip_none=False)
        checkpoints = trainer.enable_checkpointing is not False
        return [*run_callbacks(config, self.command, checkpoints), *self.callbacks]

    def _logger(self, trainer: Any) -> RunLogger:
        """A new version_N, or the run that is resumed, its curve cut where the checkpoint was written."""
        tokens = None if self._counts else self.datamodule.batch_size * self.datamodule.window
        if self.run is None or not (self.run / CONFIG).is_file():
            return RunLogger(trainer.default_root_dir or ".", RUNS, tokens_per_step=tokens)
        return RunLogger(
            self.run.parent.parent,
            self.run.parent.name,
            version=self.run.name,
            purge_step=self.checkpoint["global_step"],
            tokens_per_step=tokens,
        )

    def _check_same_network(self) -> None:
        """A checkpoint of another architecture is said so, instead of a page of missing keys."""
        held = {k: v.shape for k, v in self.checkpoint["state_dict"].items() if k.startswith("network.")}
        built = {k: v.shape for k, v in self.model.state_dict().items() if k.startswith("network.")}
        if self._counts:  # the sizes of its tables are those of the text
            built |= {name: held[name] for name in built.keys() & held.keys()}
        if held != built:
            name = next(k for k in [*built, *held] if held.get(k) != built.get(k))
            raise UserError(
                f"ckpt_path: the checkpoint holds another network than model.network describes: {name} has shape "
                f"{_shape(held.get(name))} in the checkpoint and {_shape(built.get(name))} in the network. "
                "Without --config a checkpoint brings its own network along."
            )

    # --------------------------------------------------------------------------------------------------- the verbs
    def before_fit(self) -> None:
        if self.trainer.strategy.launcher is not None:
            run_folder(self.trainer)  # chosen here: processes that are forked off could not tell this one

    def after_fit(self) -> None:
        final = self.trainer.callback_metrics.get("val/loss")
        folder = run_folder(self.trainer)
        last = None if folder is None else last_checkpoint(folder)
        places = [f"checkpoint {last}"] if last is not None and last.exists() else []
        places += [] if folder is None else [f"logs {folder}"]
        self._print_result("val", None if final is None else final.item(), places)

    def after_validate(self) -> None:
        self._print_measured("val")

    def after_test(self) -> None:
        self._print_measured("test")

    def _print_measured(self, split: Split) -> None:
        loss = self.trainer.callback_metrics.get(f"{split}/loss")
        if loss is None:
            raise UserError(f"trainer.limit_{split}_batches: no batch of the {split} split is left to measure")
        self._print_result(split, loss.item(), [])

    def _print_result(self, split: Split, loss: float | None, places: list[str]) -> None:
        if not self.trainer.is_global_zero:
            return
        line = []
        seen = self.datamodule.share_within(split, self.model.trained_on.get(self.datamodule.source.sha256, 0.0))
        if loss is not None and seen:
            line.append(f"{100 * seen:.3g} % of this {split} split is text that its weights were trained on.")
        measured = self.trainer.callback_metrics.get(f"{split}/measured")
        if measured is not None and measured < 1:
            line.append(f"Only {100 * measured:.3g} % of this {split} split was measured.")
        if self.model.leaking:
            line.append("LEAKING: this network sees the future, its numbers mean nothing.")
        if self.chosen and split == "val" and self.subcommand == "validate":
            line.append("Its weights were chosen for the lowest loss on a val split, which makes it a little too low.")
        if self.datamodule.source.substituted:
            line.append(f"Corpus {self.datamodule.source.name} in place of {self.datamodule.source.requested}.")
        if loss is not None:
            unit = self.model.tokenizer.unit
            line.append(
                f"{split} loss {loss:.4f} nats per {unit}, perplexity {perplexity(loss):.4f}, "
                f"{bits(loss):.4f} bits per {unit}."
            )
        print(" ".join(line + [f"{place};" for place in places]).rstrip(";"), flush=True)

    def predict(self, **arguments: Any) -> None:
        if not self.model.network.stateful:
            print("This network has no recurrent form: every character is generated by recomputing its prefix.")
        batches: Any = self.trainer.predict(**arguments) or []
        records = _gathered([record for batch in batches for record in batch])
        if not self.trainer.is_global_zero or not records:
            return
        assert self.run is not None
        written = write_predictions(self.run, records, asdict(self.model.sampling))
        print(records[0]["text"])
        print(f"\n{len(records)} samples; {written} and {written.with_suffix('.txt').name}")

    def audit(self, **arguments: Any) -> None:
        self.exit_code = int(not cast(Trainer, self.trainer).audit(**arguments))

    def _run_subcommand(self, subcommand: str) -> None:
        if self.dry:
            return
        if subcommand == "describe":
            self.describe()
            return
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
            stop = next((c for c in callbacks if isinstance(c, StopOnSignal)), None)
            if stop is None or not stop.signal:
                raise
            # a signal to the whole process group, as by Ctrl-C, also ends what works for a step: the compiler
            step = self.trainer.global_step + 1
            stop.exit(self.trainer, f"broke off step {step}, which is not saved: {type(error).__name__}")

    def describe(self) -> None:
        """Shows the network, or what makes it match another."""
        settings = self.config["describe"]
        length = self.datamodule.window if settings.length is None else settings.length
        vocab_size = settings.vocab_size
        if vocab_size is None:
            vocab_size = self.datamodule.tokenizer.vocab_size
        if vocab_size < 1:
            raise UserError(f"vocab_size: {vocab_size} is below 1")
        if settings.match is None and (settings.to or settings.by):
            raise UserError(f"{'to' if settings.to else 'by'}: belongs to --match parameters or --match flops")
        if settings.match is not None:
            self._match(settings, vocab_size, length)
            return
        model = to_config(_plain(settings.model))
        description = describe_config(model["network"], vocab_size, length)
        step = self._budget(settings, model, description)
        if settings.format == "json":
            print(json.dumps(description.to_dict() | ({"step": step.to_dict()} if step else {}), indent=2))
        else:
            rich.print(description.render(), *([step.render()] if step else []), sep="\n")

    def _budget(self, settings: Any, model: dict[str, Any], description: Description) -> Budget | None:
        """What a training step costs each device, where the devices are said."""
        trainer = settings.trainer
        if trainer.devices == "auto":
            for name in ("peak_flops", "bandwidth"):
                if settings[name] is not None:
                    raise UserError(f"{name}: belongs to --trainer.devices N")
            return None

        def optimizer(network: Network) -> Optimizer:
            return build(model["optimizer"], parameter_groups(network, model["weight_decay_on"]), "model.optimizer")

        precision = str(trainer.precision or self._precision(trainer.accelerator))
        return budget(
            lambda: build(model["network"], description.vocab_size, "model.network"),
            optimizer,
            Plan.read(trainer, self.datamodule.batch_size, precision),
            description,
            settings.peak_flops,
            settings.bandwidth,
        )

    def _match(self, settings: Any, vocab_size: int, length: int) -> None:
        """Prints the config that makes a network cost as much as another; exit code 1 where none comes near enough."""
        if settings.to is None:
            raise UserError("to: not given; name the config to match, --to configs/transformer.yaml")
        if settings.format != "table":
            raise UserError("format: what --match prints is a config, in YAML alone")
        try:
            other = execute(["describe", "--config", settings.to], dry=True).config["describe"]
        except UserError as error:
            raise UserError(f"to: {error}") from error
        own, to = (to_config(_plain(given)) for given in (settings, other))
        own["length"] = length
        to["length"] = to["data"]["window"] if settings.length is None else length

        found = match(own, to, settings.match, settings.by, vocab_size)
        print(f"# {found.said(settings.to)}\n{yaml.safe_dump(found.changes, sort_keys=False)}", end="", flush=True)
        if not found.holds:
            self.exit_code = 1
            sys.stderr.write(f"NOT MATCHED, this is the nearest: {found.said(settings.to)}\n")


def _leave_on_signals() -> dict[int, Any]:
    """Makes SIGINT and SIGTERM an orderly exit with 128 + signal; returns the handlers that were there."""

    def leave(number: int, *_: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}


def _sharding(strategy: Any) -> bool:
    """Whether the trainer's setting is a ModelParallelStrategy."""
    return str(getattr(strategy, "class_path", strategy)).endswith(ModelParallelStrategy.__name__)


def _plain(settings: Any) -> dict[str, Any]:
    """A parsed group as nested dictionaries."""
    return settings.as_dict()


def _shape(shape: torch.Size | None) -> str:
    return "no such parameter" if shape is None else str(tuple(shape))


def _gathered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of all processes, ordered by prompt."""
    if dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, records)
        records = [record for part in parts for record in part]
    return sorted(records, key=lambda record: record["prompt_index"])


def _quiet() -> None:
    """Leaves out what the libraries say that no user can act on."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # the configuration has it
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # a resumed run's
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
    # the metric synchronises itself
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\('(val|test)/")
    warnings.filterwarnings("ignore", message="torch.distributed.nn.functional.all_gather is deprecated")
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")  # refused where it matters
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # which nobody writes to
    warnings.filterwarnings("ignore", message=".*configure_optimizers` returned `None`")  # a network that counts
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
