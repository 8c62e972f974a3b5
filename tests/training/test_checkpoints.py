"""Checkpoints through the doors that a user has: what loading may not do, and what a write that fails leaves."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llmx import LanguageModel, TextDataModule
from llmx.cli import main
from llmx.errors import UserError
from llmx.runs.archive import read_checkpoint
from tests.laboratory import curves_of, newest_run

CHECKOUT = Path(__file__).parents[2]
STRANGER = """
from pathlib import Path
from llmx.mixers.attention import Attention

Path("executed").touch()

class Mine(Attention):
    pass
"""
HAPPENS = """
import os
from lightning.pytorch.callbacks import Callback

class Signalled(Callback):
    def __init__(self, number: int, step: int, validating: bool = False):
        self.number, self.step, self.validating = number, step, validating

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step - 1 and not self.validating:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, *_):
        if trainer.global_step == self.step and self.validating and batch_idx == 3:
            os.kill(os.getpid(), self.number)

class Interrupted(Callback):
    \"\"\"A signal to the process group, while a compiler works for a step: that dies at once.\"\"\"

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 5:
            os.kill(os.getpid(), 2)
            raise RuntimeError("CppCompileError: a page of it")

class Killed(Callback):
    \"\"\"Dies in the middle of a write, once the file has begun.\"\"\"

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 6:
            import torch

            def save(checkpoint, file):
                file.write(b"PK" * 100)
                file.flush()
                os._exit(9)

            torch.save = save
"""


@pytest.fixture
def laboratory(laboratory):
    """With modules that nobody has imported."""
    trainer = {"max_steps": 12, "val_check_interval": 4, "accelerator": "cpu"}
    laboratory.configure(trainer=trainer, model={"audit": "off"})
    Path("stranger.py").write_text(STRANGER)
    Path("happens.py").write_text(HAPPENS)
    return laboratory


def stopped(number, step, validating=False):
    """The exit code of a fit that is sent a signal."""
    callback = {"class_path": "happens.Signalled", "init_args": {"number": number, "step": step}}
    callback["init_args"]["validating"] = validating
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", "tiny.yaml", "--trainer.callbacks", json.dumps([callback])])
    return left.value.code


def refused(capsys, *arguments):
    """The message of a command that must fail and execute nothing."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not Path("executed").exists()
    assert "stranger" not in sys.modules
    return error


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def scalars(folder):
    return {tag: curves_of(folder)[tag] for tag in ("train/loss", "val/loss", "lr")}


# ------------------------------------------------------------------------------------------------- nothing executes
class Exploit:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def exploits(checkpoint):
    """Files that would run a command if they were unpickled: in torch's archive, bare, and in its oldest format."""
    torch.save({**checkpoint, "optimizer_states": [Exploit()]}, "archive.ckpt")
    Path("bare.ckpt").write_bytes(pickle.dumps(Exploit()))
    torch.save({**checkpoint, "state_dict": Exploit()}, "legacy.ckpt", _use_new_zipfile_serialization=False)
    return ("archive.ckpt", "bare.ckpt", "legacy.ckpt")


def test_a_file_with_code_is_refused_at_every_door(laboratory, capsys):
    for name in exploits(read_checkpoint(last(laboratory.fit("--trainer.max_steps", 1)))):
        for verb in ("fit", "validate", "test", "predict", "audit", "describe"):
            assert "refused without executing it" in refused(capsys, verb, "--ckpt_path", name), verb
        start = ("fit", "--config", "tiny.yaml", "--model.warm_start", name)
        assert "refused without executing it" in refused(capsys, *start)
        with pytest.raises(UserError, match="refused without executing it"):
            LanguageModel.load_from_checkpoint(name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            TextDataModule.load_from_checkpoint(name)  # Lightning's own door
        assert not Path("executed").exists()


def test_the_exploit_is_real(laboratory):
    torch.load(exploits({})[0], weights_only=False)
    assert Path("executed").exists()


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(laboratory, capsys):
    """A megabyte that would fill a gigabyte, before torch reads a byte of it."""
    path = last(laboratory.fit("--trainer.max_steps", 1))
    assert LanguageModel.load_from_checkpoint(path).window == 8
    held = zipfile.ZipFile(path)
    with zipfile.ZipFile("bomb.ckpt", "w") as bomb:
        for member in held.infolist():
            bomb.writestr(member, held.read(member))
        with bomb.open(zipfile.ZipInfo(f"{held.namelist()[0].split('/')[0]}/data/99"), "w", force_zip64=True) as file:
            file._compressor = zipfile._get_compressor(zipfile.ZIP_DEFLATED)
            file._zinfo.compress_type = zipfile.ZIP_DEFLATED
            for _ in range(64):
                file.write(bytes(2**20))
    assert Path("bomb.ckpt").stat().st_size < 2**20
    assert "unpack to more than its size" in refused(capsys, "validate", "--ckpt_path", "bomb.ckpt")
    with pytest.raises(UserError, match="unpack to more than its size"):
        LanguageModel.load_from_checkpoint("bomb.ckpt")


def test_an_archive_with_a_path_that_leaves_it_is_refused(laboratory, capsys):
    shutil.copy(last(laboratory.fit("--trainer.max_steps", 1)), "outside.ckpt")
    with zipfile.ZipFile("outside.ckpt", "a") as archive:
        archive.writestr("archive/../../executed", "")
    assert "outside its own folder" in refused(capsys, "validate", "--ckpt_path", "outside.ckpt")


@pytest.mark.parametrize("place", ["flipped", "pickle"])
def test_damage_anywhere_is_one_message(laboratory, capsys, place):
    content = bytearray(last(laboratory.fit("--trainer.max_steps", 1)).read_bytes())
    random = np.random.default_rng(0)
    size = 4000 if place == "pickle" else len(content)  # the pickle stands first
    for _ in range(40):
        damaged = bytearray(content)
        for at in random.integers(60, size, 8):
            damaged[at] ^= int(random.integers(1, 256))
        Path("damaged.ckpt").write_bytes(damaged)
        with contextlib.suppress(UserError):
            LanguageModel.load_from_checkpoint("damaged.ckpt")
    assert not Path("executed").exists()


def test_a_bit_that_changed_in_a_weight_is_noticed(laboratory, capsys):
    path = last(laboratory.fit("--trainer.max_steps", 1))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        weight = archive.read(next(name for name in archive.namelist() if name.endswith("/data/0")))
    content[content.index(weight) + 5] ^= 16
    Path("flipped.ckpt").write_bytes(content)
    for verb in ("fit", "validate", "predict"):
        assert "does not have the checksum it was written with" in refused(capsys, verb, "--ckpt_path", "flipped.ckpt")


def test_a_resumed_run_deletes_nothing_outside_its_folder(laboratory):
    """The checkpoint itself says which file the next one replaces."""
    folder = laboratory.fit("--trainer.max_steps", 4)
    checkpoint = torch.load(last(folder), weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "dirpath" in state:
            state["best_model_path"] = f"{state['dirpath']}/../../../corpus.txt"
            state["kth_best_model_path"] = state["best_model_path"]
            state["best_k_models"] = {state["best_model_path"]: torch.tensor(1e9)}
            state["last_model_path"] = f"{state['dirpath']}/../../../tiny.yaml"
    torch.save(checkpoint, last(folder).resolve())
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "8"]) == 0
    assert Path("corpus.txt").exists()
    assert Path("tiny.yaml").exists()
    assert read_checkpoint(last(folder))["global_step"] == 8


# ------------------------------------------------------------------------------------------- classes of other modules
def with_mixer(checkpoint, mixer):
    network = json.loads(json.dumps(checkpoint["hyper_parameters"]["network"]))
    network["init_args"]["block"]["init_args"]["mixer"] = mixer
    hyper_parameters = {**checkpoint["hyper_parameters"], "network": network}
    torch.save({**checkpoint, "hyper_parameters": hyper_parameters}, "foreign.ckpt")


@pytest.mark.parametrize(
    "mixer",
    [
        {"class_path": "stranger.Mine", "init_args": {"heads": 2}},
        "stranger.Mine",
        " stranger.Mine",
        "{class_path: stranger.Mine}",
        {"class_path": "Attention", "init_args": {"heads": "stranger.Mine"}},
    ],
)
def test_a_checkpoint_that_names_a_class_elsewhere_imports_nothing(laboratory, capsys, mixer):
    with_mixer(read_checkpoint(last(laboratory.fit("--trainer.max_steps", 1))), mixer)
    for verb in ("fit", "validate", "predict", "describe"):
        error = refused(capsys, verb, "--ckpt_path", "foreign.ckpt")
        assert "--trust stranger" in error or "more than plain text" in error
    with pytest.raises(UserError):
        LanguageModel.load_from_checkpoint("foreign.ckpt")
    assert "stranger" not in sys.modules


def test_a_module_that_the_user_trusts_or_imports_is_used(laboratory, capsys):
    mine = '{"class_path": "stranger.Mine", "init_args": {"heads": 2}}'
    folder = laboratory.fit("--trainer.max_steps", 1, "--model.network.block.mixer", mine)

    def forget():
        Path("executed").unlink()
        sys.modules.pop("stranger")

    forget()
    for verb in ("fit", "validate"):  # the run's own config.yaml, and the checkpoint
        assert "--trust stranger" in refused(capsys, verb, "--ckpt_path", "last")
    for trust in (["--trust", "stranger"], ["--trust=json,stranger"]):
        assert main(["validate", "--ckpt_path", "last", *trust]) == 0
        forget()
    assert main(["fit", "--ckpt_path", "last", "--trust", "stranger", "--trainer.max_steps", "2"]) == 0
    assert "stranger" not in (folder / "config.yaml").read_text().split("trust:")[1].splitlines()[0]
    forget()
    assert main(["validate", "--ckpt_path", "last", "--trust", "strangr"]) == 2
    assert "trust: 'strangr' cannot be imported" in capsys.readouterr().err
    with pytest.raises(UserError, match="import 'stranger' first"):
        LanguageModel.load_from_checkpoint(last(folder))
    import stranger  # noqa: F401

    assert type(LanguageModel.load_from_checkpoint(last(folder)).network.blocks[0].mixer).__name__ == "Mine"


def test_what_is_imported_and_no_component_is_not_built(laboratory):
    checkpoint = read_checkpoint(last(laboratory.fit("--trainer.max_steps", 1)))
    with_mixer(checkpoint, {"class_path": "subprocess.Popen", "init_args": {"executable": "/bin/sh"}})
    with pytest.raises(UserError, match="is no component"):
        LanguageModel.load_from_checkpoint("foreign.ckpt")


# ---------------------------------------------------------------------------------------------------- caches and losses
def planted(file, cache):
    """Puts content in the place of the encoded corpus, under the name that its digest asks for."""
    (held,) = cache.iterdir()
    held.unlink()
    name = f"{held.stem.split('-')[0]}-{hashlib.sha256(file).hexdigest()[:16]}.npy"
    (cache / name).write_bytes(file)


def long_header():
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b" " * 200_000 + b"3,), }\n"
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + b"abc"


def saved(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "bare pickle", "long header", "other ids", "other type"])
def test_a_planted_cache_executes_nothing_and_is_built_again(laboratory, kind):
    def tokens():
        return TextDataModule(corpus="corpus.txt", window=8).tokens("train")

    expected = tokens().copy()
    content = {
        "pickle": lambda: saved(np.array([Exploit()], dtype=object)),
        "bare pickle": lambda: pickle.dumps(Exploit()),
        "long header": long_header,
        "other ids": lambda: saved(np.full(9, 200, np.uint8)),
        "other type": lambda: saved(np.zeros(9)),
    }[kind]()
    planted(content, laboratory.folder / "cache" / "tokens")
    assert (tokens() == expected).all()
    assert not Path("executed").exists()


def test_planted_losses_are_refused(laboratory, capsys):
    folders = [
        laboratory.fit("--trainer.max_steps", 1),
        laboratory.fit("--trainer.max_steps", 1, "--model.weight_decay_on", "all"),
    ]
    for content in (saved(np.array([Exploit()], dtype=object)), long_header()):
        (folders[0] / "val_losses.npy").write_bytes(content)
        assert "val_losses.npy: cannot be read" in refused(capsys, "compare", *folders)


# ------------------------------------------------------------------------------------------------------ whole or not
def test_a_full_disk_leaves_the_checkpoint_before(laboratory, capsys):
    """A limit on the size of a file stands for the disk: the second network does not fit, the logs do."""
    folder = laboratory.fit("--trainer.max_steps", 4)
    size = last(folder).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    capsys.readouterr()
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, hard))
    try:
        code = main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "8"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert code == 2
    assert "the checkpoint could not be written" in error
    assert "Traceback" not in error
    assert read_checkpoint(last(folder))["global_step"] == 4
    assert {path.name for path in last(folder).parent.iterdir()} == {"last.ckpt", "best.ckpt", "step=4.ckpt"}
    assert main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "8"]) == 0
    assert read_checkpoint(last(folder))["global_step"] == 8


def test_a_kill_during_the_write_leaves_the_checkpoint_before(laboratory):
    command = [sys.executable, str(CHECKOUT / "main.py"), "fit", "--config", "tiny.yaml"]
    ended = subprocess.run([*command, "--trainer.callbacks", "happens.Killed"], capture_output=True)
    assert ended.returncode == 9
    folder = Path("lightning_logs/version_0")
    assert (folder / "checkpoints/checkpoint.partial").exists()
    assert read_checkpoint(last(folder))["global_step"] == 4
    assert main(["fit", "--ckpt_path", "last", "--trust", "happens", "--trainer.callbacks", "null"]) == 0
    assert {path.name for path in last(folder).parent.iterdir()} == {"last.ckpt", "best.ckpt", "step=12.ckpt"}


def test_last_leads_to_a_whole_checkpoint_at_every_moment(laboratory, monkeypatch):
    """Looked at around every change of an entry in a folder."""
    seen = []

    def watched(name):
        change = getattr(os, name)

        def look(*arguments, **keywords):
            for act in (lambda: None, lambda: change(*arguments, **keywords)):
                act()
                for path in Path("lightning_logs").glob("version_0/checkpoints/step=*.ckpt"):
                    seen.append(path.name)
                    if len(set(seen)) > 1 or last(Path("lightning_logs/version_0")).is_symlink():
                        read_checkpoint(last(Path("lightning_logs/version_0")))

        monkeypatch.setattr(os, name, look)

    for name in ("replace", "remove", "unlink", "symlink"):
        watched(name)
    laboratory.fit()
    assert set(seen) == {"step=0.ckpt", "step=4.ckpt", "step=8.ckpt", "step=12.ckpt"}


# -------------------------------------------------------------------------------------------------------- signals, last
@pytest.mark.parametrize(
    ("number", "step", "validating"),
    [
        (signal.SIGTERM, 6, False),
        (signal.SIGINT, 3, False),
        (signal.SIGINT, 8, False),  # a validation comes next
        (signal.SIGTERM, 9, False),  # and came before
        (signal.SIGTERM, 4, True),
        (signal.SIGINT, 8, True),
    ],
)
def test_a_signalled_run_is_saved_at_that_step_and_goes_on_as_if_nothing_had_been(
    laboratory, capsys, number, step, validating
):
    whole = laboratory.fit()
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    assert stopped(number, step, validating) == 128 + number
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert f"{number.name} at step {step}: saved" in capsys.readouterr().err
    part = Path("lightning_logs/version_1")
    assert read_checkpoint(last(part))["global_step"] == step
    assert main(["fit", "--ckpt_path", "last", "--trainer.callbacks", "null"]) == 0
    assert len(list(Path("lightning_logs").iterdir())) == 2
    assert scalars(part) == scalars(whole)
    states = [read_checkpoint(last(folder))["state_dict"] for folder in (part, whole)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert {path.name for path in last(part).parent.iterdir()} == {"last.ckpt", "best.ckpt", "step=12.ckpt"}


def test_what_a_signal_breaks_within_a_step_is_no_error_of_the_run(laboratory, capsys):
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", "tiny.yaml", "--trainer.callbacks", "happens.Interrupted"])
    assert left.value.code == 130
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capsys.readouterr().err.endswith("SIGINT broke off step 6, which is not saved: RuntimeError\n")
    assert read_checkpoint(last(newest_run()))["global_step"] == 4  # the one before


def test_a_signal_outside_a_fit_is_an_orderly_exit(laboratory, monkeypatch):
    folder = laboratory.fit("--trainer.max_steps", 1)
    monkeypatch.setattr(LanguageModel, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as left:
        main(["validate", "--ckpt_path", str(last(folder))])
    assert left.value.code == 130


def test_last_is_the_newest_run_below_the_root_that_the_config_gives(laboratory, capsys):
    trainer = laboratory.config["trainer"] | {"default_root_dir": "elsewhere", "max_steps": 1}
    laboratory.write_config({**laboratory.config, "trainer": trainer}, "elsewhere.yaml")
    assert "'last' found no run" in refused(capsys, "validate", "--config", "elsewhere.yaml", "--ckpt_path", "last")
    for _ in range(2):
        assert main(["fit", "--config", "elsewhere.yaml"]) == 0
    Path("elsewhere/lightning_logs/version_old").mkdir()
    for arguments in (["--config", "elsewhere.yaml"], ["--trainer.default_root_dir", "elsewhere"]):
        command = ["fit", *arguments, "--ckpt_path", "last", "--trainer.max_steps", "2"]
        assert main(command) == 0
        steps = [read_checkpoint(last(Path(f"elsewhere/lightning_logs/version_{n}")))["global_step"] for n in (0, 1)]
        assert steps == [1, 2]
    assert not Path("lightning_logs").exists()


def test_resuming_from_the_best_checkpoint_moves_last(laboratory):
    folder = laboratory.fit("--trainer.max_steps", 4)
    assert main(["fit", "--ckpt_path", str(folder / "checkpoints/best.ckpt"), "--trainer.max_steps", "8"]) == 0
    assert read_checkpoint(last(folder))["global_step"] == 8
    assert {path.name for path in last(folder).parent.iterdir()} >= {"last.ckpt", "best.ckpt", "step=8.ckpt"}
    assert not list(folder.glob("checkpoints/*-v*"))


def test_a_folder_of_shards_is_refused_with_the_command_that_makes_a_file_of_it(tmp_path):
    (tmp_path / ".metadata").touch()
    with pytest.raises(UserError, match=r"folder of shards; python -m .*consolidate_checkpoint"):
        read_checkpoint(tmp_path)
