"""The parser of the trainer's verbs: LightningCLI over the one LightningModule and the one LightningDataModule.

`ParsedCLI` reads a command and stops there. `llmx.cli.main.CLI` also builds the run and executes the verb.
"""

import inspect
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from llmx.cli.diagnosis import diagnose
from llmx.config.command import Command
from llmx.config.factories import import_collection, to_config
from llmx.data.datamodule import TextDataModule
from llmx.errors import UserError
from llmx.training.module import LanguageModel
from llmx.training.trainer import Trainer

GROUPS: dict[str, type] = {"model": LanguageModel, "data": TextDataModule}
OTHER_VERBS = ("compare", "sweep")  # each has a parser of its own
OPTIONS = [
    *("config", "seed_everything", "vocab_size", "trust", "ckpt_path", "length", "format", "match", "to", "by"),
    *("peak_flops", "bandwidth", "weights_only", "verbose", "return_predictions", "help"),
]


class ParserError(Exception):
    """The parser's complaint, before `diagnose` makes a message of it."""


class Parser(LightningArgumentParser):
    """A parser that raises its complaint; argparse would print it and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ParserError(message)


class ParsedCLI(LightningCLI):
    """The settings of a command: `settings` has the groups `trainer`, `model` and `data`, and the verb's own keys.
    Raises UserError for whatever is wrong with the command."""

    def __init__(self, command: Command):
        import_collection()
        verbs = self.subcommands()
        if command.verb in verbs:  # making the parsers of all verbs takes most of the time of a start
            self.subcommands = lambda: {command.verb: verbs[command.verb]}  # type: ignore[method-assign]  # one verb
        try:
            super().__init__(
                LanguageModel,
                TextDataModule,
                trainer_class=Trainer,
                trainer_defaults={
                    "max_epochs": -1,
                    "check_val_every_n_epoch": None,
                    "val_check_interval": 500,
                    "enable_model_summary": False,  # the description says more
                    "use_distributed_sampler": False,
                },
                seed_everything_default=1,
                parser_class=Parser,
                parser_kwargs={"epilog": f"Beside these: {' and '.join(OTHER_VERBS)}, each with its own --help."},
                save_config_callback=None,  # it would write before the network is known to build; see RunRecord
                auto_configure_optimizers=False,
                args=command.words(),
            )
        except ParserError as error:
            groups = {**GROUPS, "trainer": Trainer}
            raise UserError(diagnose(str(error), command, [*verbs, *OTHER_VERBS], groups, OPTIONS)) from error

    @property
    def settings(self) -> Any:
        """The parsed settings of the verb."""
        return self.config[self.config.subcommand]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), "audit": {"model", "datamodule"}, "describe": {"model"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "describe":
            _add_describe_arguments(parser)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_argument(
            "--vocab_size",
            type=int | None,
            help="Tokens in the vocabulary. With it describe reads no corpus, and every other verb refuses a tokenizer "
            "of another size.",
        )
        # `llmx.cli.resume` takes it out of the flags before they are parsed: no config can trust by itself
        parser.add_argument(
            "--trust",
            type=str | None,
            help="Modules of your own, separated by commas, that the checkpoint of --ckpt_path may use.",
        )
        # tokenizer and window come from the data
        parser.add_class_arguments(LanguageModel, "model", fail_untyped=False, skip={"tokenizer", "window"})
        parser.add_class_arguments(TextDataModule, "data")
        # the parser cannot write partials into a config file, so it gets the same defaults as data
        defaults = inspect.signature(LanguageModel).parameters
        parser.set_defaults({f"model.{key}": to_config(defaults[key].default) for key in ("optimizer", "schedule")})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)  # without Lightning's warning that sys.argv exists too
        for group in (*GROUPS, "trainer"):
            if not isinstance(self.settings.get(group), Namespace):
                raise UserError(f"{group}: give keys and values below it, or leave it out")

    def _parse_ckpt_path(self) -> None:
        """Lightning would let a checkpoint's hyperparameters beat the command line. See `llmx.cli.resume`."""

    def _add_instantiators(self) -> None:
        """The parser builds neither model nor data: `llmx.cli.preflight` does, from the settings as plain data."""
        for cls in (LanguageModel, TextDataModule):
            self.parser.add_instantiator(lambda *_, **__: None, cls, subclasses=False)

    def _set_seed(self) -> None:
        """Parsing alone leaves the random state as it is."""

    def instantiate_classes(self) -> None:
        """Parsing alone builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Parsing alone executes nothing."""


def _add_describe_arguments(parser: LightningArgumentParser) -> None:
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
        "feed-forwards, else dim. A key may be given by its end alone, and then stands for all keys with that end.",
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
