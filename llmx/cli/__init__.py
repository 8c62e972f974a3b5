"""The command line: `python main.py fit --config configs/transformer.yaml`."""

from llmx.cli.main import CLI, execute, main

__all__ = ["CLI", "execute", "main"]
