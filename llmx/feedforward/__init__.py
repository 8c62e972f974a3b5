"""One file a feed-forward, built and checked like a mixer: see `llmx.mixers`."""
