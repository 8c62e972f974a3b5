"""The command line: `python main.py fit --config configs/transformer.yaml`."""

from llmx.cli.main import execute, main, parse

__all__ = ["execute", "main", "parse"]
