"""python main.py fit --config configs/transformer.yaml"""

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # nothing of what is imported is garbage: looking for some took 0.6 s, and a second more in leaving
    from llmx.cli import main

    gc.freeze()
    gc.enable()
    sys.exit(main())
