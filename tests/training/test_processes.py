"""Several processes, as torchrun starts them: the same training, the same evaluation, one who writes and speaks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mmm4rec_cli.runs import newest_run, read_weights

MODEL = {"hidden_size": 16, "inner_size": 16, "d_state": 4, "head_dim": 4, "n_groups": 8, "max_len": 6}
STILL = dict.fromkeys(("dropout", "embedding_dropout", "time_dropout"), 0.0)


def words(command, *more, model=STILL, **plan):
    section = {"batch_size": 32, "accumulation": 2, "lr": 5e-3, **plan}
    settings = [f"model.{name}={value}" for name, value in (MODEL | model).items()]
    settings += [f"{command}.{name}={value}" for name, value in section.items()]
    sets = [word for setting in settings for word in ("--set", setting)]
    own = ["--pretrained", "none"] if command == "finetune" else []
    return [command, "--domain", "ring", "--encoder", "test", *own, "--epochs", "3", "--json", *sets, *more]


def run(workspace, arguments, processes=1, **options):
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MMM4REC_WORKSPACE": str(workspace.root)}
    command = [*start, "mmm4rec_cli", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)


def curve(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "count", "sets"),
    [
        ("finetune", 2, []),
        ("pretrain", 4, []),
        ("finetune", 2, ["finetune.loss=sampled", "finetune.negatives=9"]),
        ("finetune", 3, ["runtime.shard_items=always"]),
    ],
    ids=["full", "in batch", "sampled", "sharded"],
)
def test_several_processes_train_as_one(workspace, make_domain, command, count, sets):
    make_domain(users=61)
    more = [word for setting in sets for word in ("--set", setting)]
    curves = []
    for processes in (1, count):
        done = run(workspace, words(command, *more), processes)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)  # one process speaks
        trained = newest_run(workspace, command)
        assert document["run"] == trained.id
        assert document["hardware"]["processes"] == processes
        curves.append(curve(trained))
    assert [row["loss"] for row in curves[1]] == pytest.approx([row["loss"] for row in curves[0]], rel=1e-4)
    for one, several in zip(*curves, strict=True):
        assert several["valid"] == pytest.approx(one["valid"], abs=0.02)
    if command == "finetune":
        alone, shared = (json.loads(run(workspace, ["evaluate", "--json"], n).stdout) for n in (1, count))
        assert shared == alone


@pytest.mark.slow
def test_another_number_of_processes_does_not_resume(workspace, make_domain):
    make_domain(users=40)
    stopped = words("finetune", "--set", "runtime.save_minutes=0.00001", model={"dropout": 0.1})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MMM4REC_WORKSPACE": str(workspace.root)}
    stopped[stopped.index("--epochs") + 1] = "1000"
    process = subprocess.Popen(
        [sys.executable, "-m", "mmm4rec_cli", *stopped],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(workspace.runs.glob("*/*/*/state/training.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(workspace, stopped, 2)
    assert "written by 1 processes, this training has 2" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_training_killed_anywhere_ends_as_if_it_had_not_been(workspace, make_domain, kill):
    make_domain(users=60)
    arguments = words("finetune", "--set", "runtime.save_minutes=0.0005", model={"dropout": 0.1}, patience=1000)
    arguments[arguments.index("--epochs") + 1] = "12"
    assert run(workspace, arguments).returncode == 0
    whole = newest_run(workspace, "finetune")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MMM4REC_WORKSPACE": str(workspace.root)}
    resumed = False
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, "-m", "mmm4rec_cli", *arguments],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        seen = {path: path.stat().st_mtime_ns for path in workspace.runs.glob("*/*/*/state/*.safetensors")}
        while process.poll() is None and time.monotonic() < deadline and attempt < 3:
            now = {path: path.stat().st_mtime_ns for path in workspace.runs.glob("*/*/*/state/*.safetensors")}
            if now != seen:
                time.sleep(0.013 * attempt)
                process.send_signal(kill)
                break
            time.sleep(0.002)
        _, said = process.communicate(timeout=120)
        resumed |= "going on after epoch" in said
        if process.returncode == 0:
            break
    assert resumed
    assert process.returncode == 0, said
    again = newest_run(workspace, "finetune")
    assert again.path != whole.path
    old, new = read_weights(whole.weights), read_weights(again.weights)
    assert all((old[name] == new[name]).all() for name in old)
    keys = ("epoch", "loss", "lr", "valid")
    assert [[row[k] for k in keys] for row in curve(whole)] == [[row[k] for k in keys] for row in curve(again)]
