"""Bad input is one message that names the key or the file, and leaves no run."""

from pathlib import Path

import pytest


def test_a_command_that_lacks_the_essential_is_told_what(laboratory, capsys):
    assert "fit, validate, test, predict, audit, describe" in laboratory.refusal(capsys)
    assert "--config" in laboratory.refusal(capsys, "fit", "--trainer.max_steps", 5)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.network.dimm", 4], "model.network.dimm: not an argument of Decoder; did you mean dim?"),
        (["--model.network.block.mixer.headz", 4], "model.network.block.mixer.headz: not an argument of Attention"),
        (["--model.network.block.mixer", "Atention"], "no Mixer is called 'Atention'; did you mean Attention?"),
        (["--model.network.block.mixer.heads", "four"], "model.network.block.mixer.heads: expected int"),
        (["--model.network.block.mixer.heads", 3], "error: model.network.block.mixer.heads: 3 heads must divide dim 8"),
        (["--model.netwrk.dim", 4], "model.netwrk: not an argument of LanguageModel; did you mean network?"),
        (["--trainer.max_stepz", 4], "trainer.max_stepz: not an argument of Trainer; did you mean max_steps?"),
        (["--trainer.max_steps", 0], "trainer.max_steps: 0"),
        (["--model.audit", "maybe"], "model.audit: expected"),
        (["--model.sampling.top_p", 2], "model.sampling.top_p: 2.0 is not in (0, 1]"),
        (["--data.window", 2000], "data.window is 2000"),
        (["--data.corpus", "empty.txt"], "empty.txt"),
        (["--data.corpus", "latin.txt"], "offset 5"),
        (["--data.corpus", "tinyshakespere"], "tinyshakespeare"),
        (["--data.batch_size", 3, "--trainer.accumulate_grad_batches", 2], "data.batch_size is 3"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: no checkpoint at nowhere.ckpt"),
        (["--ckpt_path", "last"], "ckpt_path: 'last' found no run"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--trainer.accelerator", "abacus"], "trainer: You selected an invalid accelerator"),
        (["--trainer.devices", 0], "trainer: "),
        (["--trainer.accumulate_grad_batches", 0], "trainer.accumulate_grad_batches: 0 is below 1"),
        (["--trainer.val_check_interval", 0], "trainer.val_check_interval: 0"),
        (["--trainer.val_check_interval", -1], "val_check_interval"),
        (["--seed_everything", -1], "seed_everything: "),
        (["--trainer.default_root_dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--trainer.callbacks", "MixerMaps", "--trainer.callbacks.sentence", "é"], "trainer.callbacks.sentence: the"),
        # found by benchmarks.robustness.fuzz
        (["--trainer", "null"], "trainer: "),
        (["--config", ""], "config: "),
        (["--model.sampling", "[]"], "model.sampling: "),
        (["--model.sampling.seed", 10**30], "model.sampling.seed: "),
        (["--model.network.block", ".."], "model.network.block: no Block is called '..'"),
        (["--model.network.dropout", "null"], "model.network.dropout: null is not a value for it"),
        (["--model.network.block.mixer.dropout", 4], "model.network: a window of 8 does not pass"),
        (["--model.network.dim", 10**14], "model.network.embedding: TokenEmbedding: "),  # bytes beyond any machine's
        (["--model.optimizer.lr", -1], "model.optimizer: AdamW: Invalid learning rate"),
        (["--model.optimizer.lrx", 1], "model.optimizer.lrx: not an argument of AdamW; did you mean lr?"),
        (["--model.schedule.warmup_steps", -1], "model.schedule.warmup_steps: -1 is below 0"),
        (["--data.batch_size", 10**18], "out of memory"),
    ],
)
def test_bad_input_is_one_message_that_names_the_key(laboratory, capsys, arguments, expected):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xc3\xa9" + b"\xe9" + b" au lait" * 100)
    assert expected in laboratory.refusal(capsys, "fit", "--config", "tiny.yaml", *arguments)


def test_what_is_wrong_is_not_an_argument_of_the_class_before(laboratory, capsys):
    """The first optimizer's lr is not the second's."""
    adamw = "{model: {optimizer: {class_path: AdamW, init_args: {lr: 0.1}}}}"
    hybrid = "{model: {optimizer: {class_path: Hybrid, init_args: {hidden: BatchedMuon}}}}"
    configs = ["--config", "tiny.yaml", "--config", adamw, "--config", hybrid]
    assert "trainer.max_steps: expected int" in laboratory.refusal(capsys, "fit", *configs, "--trainer.max_steps", "x")


def test_a_config_of_a_part_alone_needs_a_network(laboratory, capsys):
    said = laboratory.refusal(capsys, "fit", "--config", "{model: {network: {init_args: {dim: 8}}}}")
    assert "model.network: give a class name" in said


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("heads: 2", "headz: 2"),
            "model.network.block.mixer.headz: not an argument of Attention; did you mean heads?",
        ),
        (("Attention", "Atention"), "model.network.block.mixer: no Mixer is called 'Atention'"),
        (("model:", "modle:"), "modle: no such key; did you mean model?"),
        (("dim: 8", "dim: wide"), "model.network.dim: expected int"),
        (("window: 8", "windows: 8"), "data.windows: not an argument of TextDataModule; did you mean window?"),
        (("heads: 2", "heads: [2"), "config: tiny.yaml: not valid YAML"),
        (("trainer:", "trainer: 5\nmore:"), "more: no such key"),
        (("window: 8", "window: null"), "data.window: null"),
        (("heads: 2", "- 2"), "model.network.block.mixer.init_args: give keys"),
        # found by benchmarks.robustness.fuzz
        (("trainer:", "trainer:\nmore:"), "more: no such key"),
        (("max_new_tokens: 12", "class_path: GRU"), "model.sampling.class_path: nothing else can stand here"),
        (("dim: 8", "dim: " + "[" * 3000 + "]" * 3000), "config: tiny.yaml: is nested too deeply"),
        (("dim: 8", "dim: &a [*a]"), "config: tiny.yaml: model.network.init_args.dim.0"),
        (("window: 8", "window: 2020-01-01"), "config: tiny.yaml: data.window: a date is not plain data"),
        (("window: 8", "window: 2020-13-45"), "config: tiny.yaml: not valid YAML: month"),
        (("corpus: corpus.txt", 'corpus: "\\uD800"'), "config: tiny.yaml: data.corpus: half of a surrogate pair"),
        (("corpus: corpus.txt", 'corpus: "\\U00010000\\x9a"'), "data.corpus: "),
    ],
)
def test_a_mistake_in_the_yaml_is_named_by_its_full_path(laboratory, capsys, change, expected):
    Path("tiny.yaml").write_text(Path("tiny.yaml").read_text().replace(*change))
    assert expected in laboratory.refusal(capsys, "fit", "--config", "tiny.yaml")


@pytest.mark.parametrize("content", [b"data: \xff", "data: {}".encode("utf-16"), b"- 1", b"5"])
def test_a_file_that_is_no_config_is_named(laboratory, capsys, content):
    Path("tiny.yaml").write_bytes(content)
    assert "config: tiny.yaml: " in laboratory.refusal(capsys, "fit", "--config", "tiny.yaml")


def test_streams_that_no_block_adds_up_are_refused(laboratory, capsys):
    block = {"mixer": "Attention", "feed_forward": "SwiGLU"}
    streams = {"class_path": "HyperConnectionBlock", "init_args": {**block, "streams": 4}}
    plain = {"class_path": "MixerOnlyBlock", "init_args": {"mixer": "GatedLinearAttention"}}  # takes any row
    cycle = {"class_path": "Cycle", "init_args": {"blocks": [streams, plain]}}
    laboratory.config["model"]["network"]["init_args"] |= {"block": cycle, "dim": 16}
    laboratory.configure()
    assert "model.network: gives (1, 8, 4, " in laboratory.refusal(capsys, "fit", "--config", "tiny.yaml")


def test_a_prompt_outside_the_vocabulary_names_the_character(laboratory, capsys):
    checkpoint = laboratory.fit() / "checkpoints/last.ckpt"
    assert "'é'" in laboratory.refusal(capsys, "predict", "--ckpt_path", checkpoint, "--data.prompts", "café")
    assert "ckpt_path" in laboratory.refusal(capsys, "predict", "--config", "tiny.yaml")


def test_an_empty_test_split_is_a_message(laboratory, capsys):
    checkpoint = laboratory.fit() / "checkpoints/last.ckpt"
    assert "data.split" in laboratory.refusal(capsys, "test", "--ckpt_path", checkpoint)
