"""`describe --match`: what it prints is given to the commands again, and has to cost what it says."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import llmx.comparison.ranking
from llmx.cli import main
from llmx.costs.matching import MATCHED, nearest

CONFIGS = Path(__file__).parents[2] / "configs"
TRANSFORMER = CONFIGS / "transformer.yaml"
V = ("--vocab_size", "65")
GROWN = "model.network.block.blocks"


@pytest.fixture(autouse=True)
def corpus(laboratory):
    laboratory.write_corpus("".join(map(chr, range(33, 98))) * 20)


def write(path, *hidden, network=(), batch_size=4, window=8, max_steps=100, mixers=None):
    """A small network of as many blocks as there are hidden widths, None for one that is not given."""
    blocks = [
        {
            "class_path": "PreNormBlock",
            "init_args": {
                "mixer": {"class_path": mixer, "init_args": {"heads": 4}},
                "feed_forward": {"class_path": "SwiGLU", "init_args": {} if width is None else {"hidden": width}},
            },
        }
        for width, mixer in zip(hidden, mixers or ["Attention"] * len(hidden), strict=True)
    ]
    block = {"class_path": "Cycle", "init_args": {"blocks": blocks}} if len(blocks) > 1 else blocks[0]
    decoder = {"class_path": "Decoder", "init_args": {"dim": 32, "depth": 2, "block": block, **dict(network)}}
    data = {"corpus": "corpus.txt", "batch_size": batch_size, "window": window}
    config = {"model": {"network": decoder}, "data": data, "trainer": {"max_steps": max_steps}}
    Path(path).write_text(json.dumps(config))
    return path


def matched(capsys, config, what, to, *arguments, code=0):
    """What `--match` prints, as data, after it was written to matched.yaml."""
    assert main(["describe", "--config", str(config), "--match", what, "--to", str(to), *arguments]) == code
    printed, errors = capsys.readouterr()
    assert errors.startswith("NOT MATCHED") == bool(code)
    assert printed.startswith("# ")
    Path("matched.yaml").write_text(printed)
    return yaml.safe_load(printed)


def described(capsys, *configs, arguments=()):
    flags = [word for config in configs for word in ("--config", str(config))]
    assert main(["describe", *flags, *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def leaves(value):
    """The leaves of nested data by key, without the classes."""
    if not isinstance(value, dict | list):
        return {"": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [(key, leaves(item)) for key, item in items if key != "class_path"]
    return {
        f"{key}.{rest}".rstrip(".").replace("init_args.", ""): x for key, found in inner for rest, x in found.items()
    }


def refused(capsys, *arguments):
    assert main(["describe", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("transformer", ["block.feed_forward.hidden"]),
        ("gpt2", ["block.feed_forward.hidden"]),
        ("griffin", [f"block.blocks.{i}.feed_forward.hidden" for i in range(3)]),
        ("seed/transformer", ["feed_forward.hidden"]),
        ("mamba2", ["dim"]),
        ("lstm", ["dim"]),
        ("mlp_window", ["dim"]),
    ],
)
def test_a_config_of_the_collection_gets_as_many_parameters_as_another(capsys, name, keys):
    config = CONFIGS / f"{name}.yaml"
    changes = leaves(matched(capsys, config, "parameters", TRANSFORMER, *V))
    assert list(changes) == [f"model.network.{key}" for key in keys]
    assert len(set(changes.values())) == 1
    goal = described(capsys, TRANSFORMER, arguments=V)["parameters"]
    found = described(capsys, config, "matched.yaml", arguments=V)["parameters"]
    assert found == pytest.approx(goal, rel=0.02)
    first = Path("matched.yaml").read_text().splitlines()[0]
    percent = round(100 * (found / goal - 1), 2) + 0.0
    assert first == f"# parameters: {found:,}, and {goal:,} in {TRANSFORMER} ({percent:+.2f} %)"
    if name == "transformer":
        assert list(changes.values()) == [341]


def test_no_other_size_is_nearer(capsys):
    to = write("to.yaml", 50)
    size = leaves(matched(capsys, write("own.yaml", 20, network={"tied": True}), "parameters", to))
    (key, held), goal = *size.items(), described(capsys, to)["parameters"]
    away = {
        n: abs(described(capsys, "own.yaml", arguments=(f"--{key}", str(n)))["parameters"] - goal)
        for n in range(held - 2, held + 3)
    }
    assert min(away, key=away.get) == held


def test_a_width_that_the_heads_do_not_divide_is_stepped_over(capsys):
    to = write("to.yaml", 50)
    changes = leaves(matched(capsys, write("own.yaml", 20), "parameters", to, "--by", "dim"))
    assert changes == {"model.network.dim": 40}  # of 32, 40 and 48: heads of an even width


def test_sizes_that_vary_together_keep_their_ratio_and_one_not_given_is_as_large_as_the_largest(capsys):
    to = write("to.yaml", 100)
    own = write("own.yaml", 30, 10, None, network={"depth": 3})
    sizes = [*leaves(matched(capsys, own, "parameters", to)).values()]
    assert sizes[0] == sizes[2]
    assert sizes[1] == round(sizes[0] / 3)


def test_the_key_of_one_entry_leaves_the_others_and_all_of_it_is_trained(capsys):
    own = write("own.yaml", 20, 30, mixers=["Attention", "MLSTM"])
    changes = matched(
        capsys, own, "parameters", write("to.yaml", 50), "--by", f"{GROWN}.0.init_args.feed_forward.hidden"
    )
    assert list(leaves(changes)) == [f"{GROWN}.0.feed_forward.hidden"]
    flags = ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false", f"--{GROWN}.1.mixer.heads", "2"]
    assert main(["fit", "--config", own, "--config", "matched.yaml", *flags]) == 0
    config = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    trained = leaves(config["model"]["network"])
    assert trained["block.blocks.0.feed_forward.hidden"] == leaves(changes)[f"{GROWN}.0.feed_forward.hidden"]
    assert trained["block.blocks.1.feed_forward.hidden"] == 30
    assert (trained["block.blocks.0.mixer.heads"], trained["block.blocks.1.mixer.heads"]) == (4, 2)


@pytest.mark.parametrize("by", [[], ["--by", "trainer.max_steps"]])
def test_equal_training_flops_are_a_matter_of_steps(capsys, by):
    own, to = write("own.yaml", 20, batch_size=3, window=8), write("to.yaml", 50, batch_size=4, window=6)
    changes = matched(capsys, own, "flops", to, *by)
    steps = changes["trainer"].pop("max_steps")
    assert changes == {"trainer": {}}
    a_step = 3 * 8 * described(capsys, own)["training_flops_per_token"]
    goal = 100 * 4 * 6 * described(capsys, to)["training_flops_per_token"]
    assert abs(steps * a_step - goal) <= a_step / 2
    assert f"# training FLOPs: {steps * a_step:,.0f}, and {goal:,.0f} in" in Path("matched.yaml").read_text()


def test_by_a_size_the_flops_of_a_token_are_matched_at_the_length_that_is_asked_for(capsys):
    own, to = write("own.yaml", 20, mixers=["LinearAttention"]), write("to.yaml", 50)
    for length in ((), ("--length", "64")):
        matched(capsys, own, "flops", to, "--by", "hidden", *length)
        flops = [
            described(capsys, *x, arguments=length)["training_flops_per_token"] for x in ((own, "matched.yaml"), [to])
        ]
        assert flops[0] == pytest.approx(flops[1], rel=0.01)


def test_what_comes_no_nearer_is_printed_and_said_to_be_no_match(capsys):
    own, to = write("own.yaml", 20), write("to.yaml", 500)
    assert leaves(matched(capsys, own, "parameters", to, "--by", "kv_heads", code=1)) == {
        "model.network.block.mixer.kv_heads": 4
    }


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--match", "size"], "match: expected Literal['parameters', 'flops']. Got value: size"),
        (["--match", "flops"], "to: not given"),
        (["--to", "to.yaml"], "to: belongs to --match"),
        (["--by", "dim"], "by: belongs to --match"),
        (["--match", "flops", "--to", "nowhere.yaml"], "to: config: nowhere.yaml: No such file"),
        (["--match", "flops", "--to", "wrong.yaml"], "to: model.network.block.mixer.heads: 4 heads must divide dim 33"),
        (["--match", "flops", "--to", "endless.yaml"], "to: gives no trainer.max_steps"),
        (["--match", "flops", "--to", CONFIGS / "ngram.yaml"], "to: model.network: NGram cannot be matched by flops"),
        (["--match", "parameters", "--to", "to.yaml", "--format", "json"], "format: what --match prints is a config"),
        (["--match", "parameters", "--to", "to.yaml", "--by", "hiden"], "by: model.network has no key that ends with"),
        (["--match", "parameters", "--to", "to.yaml", "--by", "idden"], "by: model.network has no key that ends with"),
        (["--match", "parameters", "--to", "to.yaml", "--by", "tied"], "by: model.network.tied is no size, a whole"),
        (
            ["--match", "parameters", "--to", "to.yaml", "--by", "feed_forward"],
            "by: model.network.block.feed_forward is",
        ),
        (
            ["--match", "parameters", "--to", "to.yaml", "--by", "heads"],
            "by: model.network.block.mixer.heads: 2 costs no more than 1",
        ),
        (["--match", "parameters", "--to", "to.yaml", "--length", "many"], "length: "),
    ],
)
def test_what_makes_no_sense_is_one_line_that_says_why(capsys, arguments, expected):
    write("to.yaml", 50)
    write("wrong.yaml", 50, network={"dim": 33})
    write("endless.yaml", 50, max_steps=-1)
    assert refused(capsys, "--config", write("own.yaml", 20), *arguments).startswith(expected)


def test_a_config_that_cannot_be_built_is_not_searched(capsys):
    arguments = ["--match", "parameters", "--to", write("to.yaml", 50)]
    wrong = write("wrong.yaml", 20, network={"dim": 33})
    assert refused(capsys, "--config", wrong, *arguments).startswith("model.network.block.mixer.heads: 4 heads must")
    counting = refused(capsys, "--config", CONFIGS / "ngram.yaml", *V, *arguments)
    assert counting == "model.network: NGram cannot be matched by parameters, there are none"


@given(goal=st.integers(1, 5000), step=st.integers(1, 40), last=st.integers(40, 200), power=st.sampled_from([1, 2]))
def test_the_search_finds_what_looking_at_all_of_them_finds(goal, step, last, power):
    def cost(n):
        return n**power + 3 if n % step == 0 and n <= last else None

    found, reached = nearest(cost, goal)
    assert reached == cost(found)
    assert abs(reached - goal) == min(abs(cost(n) - goal) for n in range(step, last + 1, step))


def test_the_search_says_where_there_is_nothing_to_find():
    with pytest.raises(ValueError, match="none of 1 to"):
        nearest(lambda n: None, 3)
    with pytest.raises(ValueError, match="2 costs no more than 1"):
        nearest(lambda n: 7, 3)


def test_matched_is_what_compare_calls_equal():
    assert MATCHED == llmx.comparison.ranking.MATCHED
