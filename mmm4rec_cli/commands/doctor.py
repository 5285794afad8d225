"""`mmm4rec doctor`."""

from collections.abc import Mapping
from typing import Any

from mmm4rec_cli.commands.invocation import Invocation, Result, command


@command("mmm4rec doctor", "mmm4rec doctor --json")
def doctor(invocation: Invocation) -> Result:
    """Show what this machine can run: Python, torch, GPU, each kernel backend live or why not, encoders, disk space."""
    from mmm4rec_cli.console import table
    from mmm4rec_cli.doctor import examine

    found = examine(invocation.workspace, invocation.reporter)
    gpus = [f"{gpu['name']}, {_gib(gpu['free_bytes'])} of {_gib(gpu['memory_bytes'])} free" for gpu in found["gpus"]]
    machine = [
        ("mmm4rec", found["mmm4rec"]),
        ("Python", f"{found['python']['version']} on {found['python']['platform']}"),
        ("torch", f"{found['torch']['version']}, {found['torch']['threads']} threads"),
        ("GPU", "; ".join(gpus) or f"none: {found['torch']['why']}"),
        ("CPU", f"{found['cpu']['count']} cores, {_gib(found['cpu']['memory_bytes'])} memory"),
        (
            "disk",
            f"{_gib(found['disk']['free_bytes'])} of {_gib(found['disk']['total_bytes'])} free at "
            f"{found['disk']['path']}",
        ),
        *((name, present or "not installed") for name, present in found["packages"].items() if name != "torch"),
    ]
    kernels = [
        (operation, name, *_live(state))
        for operation, states in found["backends"].items()
        for name, state in states.items()
    ]
    choices = [(operation, *place) for operation, places in found["choices"].items() for place in places.items()]
    encoders = [(name, *_live(state)) for name, state in found["encoders"].items()]
    optional = [
        (name, about["version"] or f"no: {about['install']}", about["for"]) for name, about in found["optional"].items()
    ]
    workspace = invocation.workspace
    domains = sorted(path.parent.name for path in workspace.processed("any").parent.glob("*/manifest.json"))
    following = workspace.command("finetune", "--domain", domains[0]) if domains else "mmm4rec demo --workspace demo"
    return Result(
        found,
        table("machine", ("what", "found"), machine),
        table("kernel backends", ("operation", "backend", "live", "why"), kernels),
        table("what backend auto takes", ("operation", "tensors on", "backend"), choices),
        table("encoders on disk", ("encoder", "here", "why"), encoders),
        table("optional packages", ("package", "installed", "for"), optional),
        next=following,
    )


def _live(state: Mapping[str, Any]) -> tuple[bool, str]:
    return state["available"], state["why"]


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
