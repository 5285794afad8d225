"""How large the loss's gradients are in MMM4Rec's time branch, beside those of the rest and beside weight decay's pull.

    python examples/studies/time_gradients.py ml100k.npz --time published

Prints one JSON row a kind of parameter and step: the root mean square of the gradient, of the weights, and of what
L2 of 0.005 adds to the gradient.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from baselines import read_inputs

from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.settings import load

KINDS = {
    "step-size maps of the time branch": (".time.mlp_",),
    "convolutions of the time branch": (".time.conv_",),
    "gates, norms and filters of the streams": ("time_gate", "time_norm", "filter", "gaps."),
}
DECAY = 0.005


def kind_of(name: str) -> str:
    """Of a parameter."""
    return next((kind for kind, parts in KINDS.items() if any(part in f".{name}" for part in parts)), "all others")


def main(words: list[str] | None = None) -> list[dict[str, object]]:
    """Take steps and measure after some of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--time", choices=("observed", "published"), default="published")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 20, 40])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--set", action="append", default=[], help="as of `mmm4rec`")
    args = parser.parse_args(words)
    settings = load(overrides=[f"model.time={args.time}", *args.set])
    dataset = read_inputs(args.inputs)
    torch.manual_seed(1)
    model = build_model("mmm4rec", settings.model, dataset.model_features("mean"))
    optimiser = torch.optim.NAdam(model.parameters(), args.lr, weight_decay=DECAY)
    targets = dataset.sequences.split("leave_one_out").train
    found = []
    for step in range(1, max(args.steps) + 1):
        batch = targets[torch.randint(len(targets), (args.batch,))].sort().values
        windows = dataset.sequences.windows(batch, settings.model.max_len, with_target_time=model.reads_target_time)
        optimiser.zero_grad()
        model.training_loss(windows).backward()
        if step in args.steps:
            found += measure(model, step)
        optimiser.step()
    for row in found:
        print(json.dumps(row))
    return found


def measure(model: torch.nn.Module, step: int) -> list[dict[str, object]]:
    """One row a kind."""
    gradients, weights = defaultdict(list), defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[kind_of(name)].append(parameter.grad.flatten())
            weights[kind_of(name)].append(parameter.detach().flatten())

    def size(parts: list[torch.Tensor]) -> float:
        return float(f"{torch.cat(parts).square().mean().sqrt():.3g}")

    return [
        {"step": step, "parameters": kind, "gradient": size(gradients[kind]), "weights": size(weights[kind])}
        | {"pull of weight decay": float(f"{DECAY * size(weights[kind]):.3g}")}
        for kind in (*KINDS, "all others")
        if kind in gradients
    ]


if __name__ == "__main__":
    main()
