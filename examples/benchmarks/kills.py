"""Kill trainings at random moments, go on with each, and compare the end with a training that nobody killed.

    python examples/benchmarks/kills.py --kills 30
    python examples/benchmarks/kills.py --kills 6 --epochs 2 --device cpu

Pre-training and fine-tuning in turn, each kill by SIGKILL, SIGTERM or SIGINT at a moment drawn from the time between a
process's first word and the end of a whole training. Killed processes are started again with the same command until
they end; then all weights and rows of `metrics.jsonl` (seconds apart) must equal, bit for bit, those of the training
that was left alone. Needs no data set.
"""

import argparse
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from serve import made_up

from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.reporter import SilentReporter
from mmm4rec_cli.runs import Run, all_runs, newest_run, read_weights
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.finetune import finetune_on
from mmm4rec_cli.training.pretrain import pretrain_on
from mmm4rec_cli.workspace import Workspace

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOST_TRIES = 20
"""Processes of one training, after which it is left alone to end."""


def trained(command: str, workspace: Workspace, device: str, epochs: int) -> None:
    """What a killed process does: one training, or the rest of it."""
    plan = {"epochs": epochs, "batch_size": 256, "accumulation": 2}
    sizes = {"hidden_size": 64, "inner_size": 64, "head_dim": 16, "d_state": 16}
    settings = Settings.model_validate(
        {
            "model": sizes,
            "pretrain": plan,
            "finetune": plan | {"patience": 10_000},
            "runtime": {"device": device, "save_minutes": 0.0005},
        }
    )
    dataset: Dataset = made_up(200, 200, 32)
    if command == "pretrain":
        pretrain_on(workspace, dataset, settings, reporter=Spoken())
    else:
        finetune_on(workspace, dataset, settings, pretrained="none", reporter=Spoken())


class Spoken(SilentReporter):
    """Prints the notes."""

    def note(self, text: str) -> None:
        print(text, flush=True)


def processed(command: str, root: Path, device: str, epochs: int) -> subprocess.Popen[str]:
    """A process that trains in the workspace, or goes on there."""
    words = [__file__, "--process", command, "--device", device, "--epochs", str(epochs), "--workspace", str(root)]
    return subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def heard(process: subprocess.Popen[str]) -> str:
    """The first line that a process says: its training begins."""
    assert process.stdout is not None
    return process.stdout.readline()


def ended(process: subprocess.Popen[str]) -> tuple[str, float]:
    """What a process said that was left alone to end, and the seconds since its first line.

    Raises:
        RuntimeError: it failed.
    """
    said, begin = heard(process), time.perf_counter()
    said += process.communicate()[0]
    if process.returncode != 0:
        raise RuntimeError(said)
    return said, time.perf_counter() - begin


def difference(whole: Run, again: Run) -> str:
    """Where two trainings differ; empty where they are equal bit for bit."""
    old, new = read_weights(whole.weights), read_weights(again.weights)
    for name in old:
        if not torch.equal(old[name], new[name]):
            return f"{name}, by {float((old[name] - new[name]).abs().max()):.3g}"
    keys = ("epoch", "loss", "lr", "valid")
    if [[row[key] for key in keys] for row in whole.epochs] != [[row[key] for key in keys] for row in again.epochs]:
        return "metrics.jsonl"
    return ""


def killed(command: str, device: str, epochs: int, kills: int, draw: random.Random) -> dict[str, object]:
    """Kill trainings of one command so many times and compare each with the one left alone."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ended(processed(command, root, device, epochs))  # compiles what is kept in caches
        _, life = ended(processed(command, root, device, epochs))
        whole = newest_run(Workspace(root), command)
        assert whole is not None
        found: dict[str, object] = {"command": command, "seconds_alone": life}
        done = dict.fromkeys(("kills", "resumed", "trainings", "unequal"), 0)
        first = difference(whole, list(all_runs(Workspace(root), command))[1])
        if first:
            done["unequal"] += 1
            print(f"two whole trainings differ: {first}", flush=True)
        while done["kills"] < kills:
            before = {run.id for run in all_runs(Workspace(root), command)}
            for attempt in range(MOST_TRIES):
                process = processed(command, root, device, epochs)
                if done["kills"] < kills and attempt < MOST_TRIES - 1:
                    said = heard(process)
                    try:
                        process.wait(draw.uniform(0, life))
                    except subprocess.TimeoutExpired:
                        process.send_signal(draw.choice(SIGNALS))
                    said += process.communicate()[0]
                    done["kills"] += process.returncode != 0
                    done["resumed"] += "going on after epoch" in said
                    if process.returncode == 0:
                        break
                else:
                    done["resumed"] += "going on after epoch" in ended(process)[0]
                    break
            again = newest_run(Workspace(root), command)
            assert again is not None
            assert again.id not in before
            wrong = difference(whole, again)
            done["trainings"] += 1
            done["unequal"] += bool(wrong)
            print(f"{command}: {done['kills']} kills, {wrong or 'equal'}", flush=True)
        return found | done


def main() -> None:
    """Kill, compare, print one line a command; ends with 1 where anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of both commands together")
    parser.add_argument("--epochs", type=int, default=40, help="of a training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and signals")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commands", nargs="+", default=["finetune", "pretrain"], choices=["finetune", "pretrain"])
    parser.add_argument("--out", type=Path, help="JSON lines, added to")
    parser.add_argument("--process", choices=["finetune", "pretrain"], help=argparse.SUPPRESS)
    parser.add_argument("--workspace", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.process:
        trained(given.process, Workspace(given.workspace), given.device, given.epochs)
        return
    device = resolve_device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    draw, unequal = random.Random(given.seed), 0
    for command in given.commands:
        row = killed(command, given.device, given.epochs, -(-given.kills // len(given.commands)), draw)
        row |= {"device": name, "torch": torch.__version__}
        unequal += int(str(row["unequal"]))
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
    sys.exit(1 if unequal else 0)


if __name__ == "__main__":
    main()
