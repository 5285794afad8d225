"""The command line: exit codes, JSON errors, help, and what is loaded when."""

import json
import signal
import subprocess
import sys
import time

import pytest
import typer

from mmm4rec_cli import __version__, app, errors
from mmm4rec_cli.commands.invocation import Invocation, Result, command

HEAVY = {
    "torch",
    "polars",
    "pyarrow",
    "numpy",
    "transformers",
    "sklearn",
    "tensorboardX",
    "pydantic_settings",
}


@pytest.fixture
def with_command(monkeypatch):
    """Add a command that runs `body` to the command line."""

    def add(body):
        made = command("mmm4rec probe")(body)
        probed = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
        probed.callback()(app._root)
        probed.command(made.name)(made.run)
        monkeypatch.setattr(app, "app", probed)
        monkeypatch.setattr(app, "COMMANDS", (("Probes", made),))

    return add


def raising(error):
    def probe(invocation: Invocation) -> Result:
        """Fail."""
        raise error

    return probe


def run(capsys, *words):
    code = app.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", errors.UserError.__subclasses__())
def test_a_users_error_is_its_exit_code_one_line_a_problem_and_one_hint(with_command, capsys, kind):
    with_command(raising(kind("first", "second", hint="do this")))
    assert run(capsys, "probe") == (kind.code, "", "error: first\nerror: second\nhint: do this\n")
    code, out, err = run(capsys, "probe", "--json")
    assert (code, err) == (kind.code, "")
    assert json.loads(out) == {"error": {"code": kind.code, "message": "first\nsecond", "hint": "do this"}}


def test_exit_codes_are_those_of_the_contract():
    codes = {kind.__name__: kind.code for kind in errors.UserError.__subclasses__()}
    assert codes == {"UsageError": 2, "DataError": 3, "RunError": 4, "DeviceError": 5, "NetworkError": 6}


@pytest.mark.parametrize(
    "words",
    [["runs", "--no-such-option"], ["runs", "--domain"], ["no-such-command"], ["--no-such-option"], ["runs", "x"]],
)
def test_usage_errors_are_2_and_json_too(capsys, words):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.splitlines()[-1].startswith("hint: mmm4rec ")
    assert "Traceback" not in err
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["code"] == 2


def test_a_misspelt_command_or_option_is_offered_rightly_spelt(capsys):
    assert "'runs'" in run(capsys, "rns")[2]
    assert "--workspace" in run(capsys, "runs", "--workspaec", "x")[2]


def test_a_misspelt_setting_is_a_usage_error(with_command, capsys):
    def probe(invocation: Invocation) -> Result:
        """Read the settings."""
        return Result(invocation.settings().model_dump(mode="json"), "read")

    with_command(probe)
    code, out, _ = run(capsys, "probe", "--set", "finetune.lrr=1", "--json")
    assert code == 2
    assert json.loads(out)["error"]["message"].endswith("did you mean finetune.lr?")
    assert json.loads(run(capsys, "probe", "--set", "finetune.lr=1", "--json")[1])["finetune"]["lr"] == 1


def test_a_bug_is_1_with_its_traceback(with_command, capsys):
    with_command(raising(KeyError("lost")))
    code, out, err = run(capsys, "probe", "--json")
    assert code == 1
    assert json.loads(out)["error"]["code"] == 1
    assert "Traceback" in err
    with_command(raising(ValueError("not from a kernel")))
    assert run(capsys, "probe")[0] == 1


def test_an_interrupted_command_is_130(with_command, capsys):
    with_command(raising(KeyboardInterrupt()))
    code, out, err = run(capsys, "probe", "--json")
    assert (code, err) == (130, "")
    assert json.loads(out)["error"]["code"] == 130


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda torch: torch.OutOfMemoryError("CUDA out of memory.\nTried"), "CUDA out of memory."),
        (lambda torch: RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "DefaultCPUAllocator"),
        (lambda torch: MemoryError(), "MemoryError"),
    ],
)
def test_out_of_memory_is_5_and_says_what_to_lower(with_command, capsys, make, says):
    with_command(raising(make(pytest.importorskip("torch"))))
    code, out, err = run(capsys, "probe")
    assert (code, out) == (5, "")
    assert says in err
    assert "batch_size" in err


@pytest.mark.parametrize(
    ("command_name", "setting"), [("finetune", "finetune.accumulation"), ("preprocess", "features.batch_size")]
)
def test_what_to_lower_fits_the_command(command_name, setting):
    assert setting in app._less_memory(command_name)


def test_a_kernel_that_refuses_is_5(with_command, capsys):
    import torch

    import mmm4rec_kernels

    def unavailable(invocation: Invocation) -> Result:
        """Ask for a GPU's backend on the CPU."""
        x = torch.zeros(1, 2, 3)
        mmm4rec_kernels.causal_conv1d(x, torch.zeros(3, 2), backend="causal_conv1d")
        raise AssertionError("the CPU has no such backend")

    def unknown(invocation: Invocation) -> Result:
        """Ask for a backend that nobody wrote."""
        mmm4rec_kernels.causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 2), backend="abacus")
        raise AssertionError("there is no such backend")

    for body, says in ((unavailable, "causal_conv1d"), (unknown, "abacus")):
        with_command(body)
        code, _, err = run(capsys, body.__name__)
        assert code == 5
        assert says in err
        assert "doctor" in err


def test_json_is_the_only_thing_on_standard_output(with_command, capsys):
    def probe(invocation: Invocation) -> Result:
        """Print, as a library might."""
        print("noise")
        invocation.reporter.note("a note")
        return Result({"ä": 1.5}, "shown to people", next="mmm4rec runs")

    with_command(probe)
    code, out, err = run(capsys, "probe", "--json")
    assert (code, json.loads(out)) == (0, {"ä": 1.5})
    assert err == "noise\na note\n"
    assert run(capsys, "probe")[1] == "noise\nshown to people\nnext: mmm4rec runs\n"
    assert run(capsys, "probe", "--quiet") == (0, "noise\nshown to people\nnext: mmm4rec runs\n", "")


def test_common_options_reach_the_command(with_command, capsys, tmp_path, monkeypatch):
    seen = []

    def probe(invocation: Invocation) -> Result:
        """Look at the common options."""
        seen.append(invocation)
        return Result({})

    with_command(probe)
    monkeypatch.setenv("MMM4REC_WORKSPACE", str(tmp_path))
    assert run(capsys, "probe", "--set", "a=1", "--set", "b=2", "--config", "c.toml")[0] == 0
    assert run(capsys, "probe", "--workspace", "elsewhere")[0] == 0
    assert (seen[0].workspace.root, seen[0].overrides, str(seen[0].config)) == (tmp_path, ("a=1", "b=2"), "c.toml")
    assert str(seen[1].workspace.root) == "elsewhere"


def test_version_and_bare_call(capsys):
    assert run(capsys, "--version") == (0, f"mmm4rec {__version__}\n", "")
    code, out, _ = run(capsys)
    assert code == 2
    assert "runs" in out


def test_every_command_has_help_examples_and_the_default_of_every_option(capsys):
    group = typer.main.get_command(app.app)
    assert list(group.commands) == [each.name for _, each in app.COMMANDS]
    for _, each in app.COMMANDS:
        code, out, err = run(capsys, each.name, "--help")
        assert (code, err) == (0, "")
        assert all(example.startswith(f"mmm4rec {each.name}") for example in each.examples)
        assert each.examples
        assert "Examples:" in out
        options = {option.name: option for option in group.commands[each.name].params}
        assert {"workspace", "config", "overrides", "json", "quiet"} <= set(options)
        for name, option in options.items():
            assert option.help, f"{each.name} --{name} has no help"
            has_default = isinstance(option.show_default, str) or option.default not in (None, ())
            assert has_default or name == "help", f"{each.name} --{name} does not show its default"


def test_defaults_shown_for_settings_are_the_settings_own():
    from mmm4rec_cli.settings import Settings

    defaults = Settings().model_dump(mode="json")
    group = typer.main.get_command(app.app)
    for name, each in group.commands.items():
        for option in each.params:
            shown = option.show_default
            if isinstance(shown, str) and " = " in shown:
                path, _, value = shown.partition(" = ")
                found = defaults
                for key in path.split("."):
                    found = found[key]
                text = ",".join(map(str, found)) if isinstance(found, list) else str(found).lower()
                assert text == value, f"{name} --{option.name}"


@pytest.mark.parametrize("name", ["", *(each.name for _, each in app.COMMANDS)])
def test_help_loads_nothing_heavy(name):
    code = (
        "import sys\nfrom mmm4rec_cli.app import main\n"
        f"code = main({[name, '--help'] if name else ['--help']!r})\n"
        f"sys.exit(code or ' '.join({HEAVY!r} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_both_ways_to_start_are_one(tmp_path):
    done = subprocess.run([sys.executable, "-m", "mmm4rec_cli", "nonsense"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


SLEEPER = """
import sys, time
from pathlib import Path
from mmm4rec_cli import app
from mmm4rec_cli.commands.invocation import Invocation, Result, command
from mmm4rec_cli.files import written_whole

def probe(invocation: Invocation) -> Result:
    '''Write for a long time.'''
    with written_whole(invocation.workspace.root / "table") as part:
        part.write_text("half")
        print("writing", flush=True)
        time.sleep(60)
    return Result({})

made = command("mmm4rec probe")(probe)
app.app.command(made.name)(made.run)
sys.exit(app.main(["probe", "--workspace", sys.argv[1]]))
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_half_written(tmp_path, sent, code):
    running = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout.readline() == "writing\n"
    time.sleep(0.1)
    running.send_signal(sent)
    _, err = running.communicate(timeout=20)
    assert running.returncode == code
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error(tmp_path):
    shell = f"{sys.executable} -m mmm4rec_cli --help | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert done.stderr == ""
