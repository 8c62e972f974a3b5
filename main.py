"""python main.py fit --config configs/transformer.yaml"""

import sys

from llmx.cli import main

if __name__ == "__main__":
    sys.exit(main())
