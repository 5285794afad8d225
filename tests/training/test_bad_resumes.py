"""What can be wrong when a training is gone on with, and running out of memory: one line, one hint, an exit code."""

import json
import os
import resource
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from mmm4rec_cli.app import main
from mmm4rec_cli.runs import all_runs
from mmm4rec_cli.training import loop

SETTINGS = """
[model]
hidden_size = 16
inner_size = 16
d_state = 4
head_dim = 4
max_len = 6
[finetune]
epochs = 3
batch_size = 64
accumulation = 1
lr = 0.005
[runtime]
device = "cpu"
"""


@pytest.fixture
def resume(workspace, make_domain, monkeypatch, capsys):
    """Types `finetune --resume` of a run that was interrupted in its second epoch; gives code, output, state file."""
    make_domain(users=25)
    workspace.config.write_text(SETTINGS)
    common = ["--workspace", str(workspace.root)]
    epoch, calls = loop.train_epoch, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", interrupted)
        assert main(["finetune", "--domain", "ring", "--pretrained", "none", *common]) == 130
    (run,) = all_runs(workspace, "finetune")
    capsys.readouterr()

    def typed(*words):
        code = main(["finetune", "--resume", run.id, *words, *common])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return typed, run.path / "state" / "training.safetensors"


def test_other_data_and_other_vectors_are_4(resume, make_domain):
    typed, state = resume
    make_domain(users=25, seed=3, widths=(7, 5))
    code, out, err = typed()
    assert (code, out) == (4, "")
    assert "was started on other data and item vectors" in err
    assert state.is_file()


def test_an_option_against_the_run_is_2_with_both_values(resume):
    typed, state = resume
    code, out, err = typed("--set", "finetune.lr=0.1")
    assert (code, out) == (2, "")
    assert "finetune.lr (--set finetune.lr): 0.1, but" in err
    assert "0.005" in err
    assert state.is_file()


def test_another_file_of_settings_is_one_note_and_the_runs_values_hold(resume, workspace):
    typed, _ = resume
    workspace.config.write_text(SETTINGS.replace("lr = 0.005", "lr = 0.1"))
    code, _, err = typed()
    assert code == 0
    assert err.count("finetune.lr") == 1
    (run,) = all_runs(workspace, "finetune")
    rows = [json.loads(row) for row in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [0.005] * 3


@pytest.mark.parametrize("left", [0, 7, 1000])
def test_a_truncated_state_is_4(resume, left):
    typed, state = resume
    state.write_bytes(state.read_bytes()[:left])
    code, out, err = typed()
    assert (code, out) == (4, "")
    assert "training.safetensors cannot be resumed from" in err
    assert "without --resume" in err


def test_a_state_of_other_processes_is_4(resume):
    typed, state = resume
    with safe_open(state, framework="pt") as file:
        document = json.loads(file.metadata()["progress"]) | {"processes": 4}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, state, {"progress": json.dumps(document)})
    code, out, err = typed()
    assert (code, out) == (4, "")
    assert "was written by 4 processes, this training has 1" in err
    assert "torchrun --nproc-per-node 4" in err


@pytest.mark.slow
def test_out_of_memory_is_5_and_names_what_to_lower(workspace, make_domain):
    """The process may have 12 GiB of addresses; a model this wide takes more."""
    make_domain(users=25)
    workspace.config.write_text(SETTINGS)
    words = ["finetune", "--domain", "ring", "--pretrained", "none", "--set", "model.hidden_size=32768", "--json"]
    limit = 12 * 2**30
    done = subprocess.run(
        [sys.executable, "-m", "mmm4rec_cli", *words, "--workspace", str(workspace.root)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 5, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["code"] == 5
    assert error["message"].startswith("out of memory")
    assert "finetune.batch_size" in error["hint"]
    assert "model.hidden_size" in error["hint"]
    assert "Traceback" not in done.stderr
    assert not list(workspace.runs.glob("*/*/*"))
