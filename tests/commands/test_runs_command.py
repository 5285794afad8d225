"""`mmm4rec runs`."""

import json
import shutil
import subprocess
import sys

import pytest

from mmm4rec_cli.app import main
from mmm4rec_cli.files import write_json
from mmm4rec_cli.settings import Settings


@pytest.fixture
def workspace(tmp_path):
    def write(command, domain, name, result):
        folder = tmp_path / "runs" / command / domain / name
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"command": command, "domain": domain, "model": "mmm4rec"})
        write_json(folder / "settings.json", Settings().model_dump(mode="json"))
        if result is not None:
            write_json(folder / "result.json", result)

    metrics = {"valid": {"NDCG@10": 0.25, "MRR": 0.1}, "test": {"NDCG@10": 0.125, "MRR": 0.1}}
    write("finetune", "pantry", "20260101-000000-aaaaaa", {"metrics": metrics, "best_epoch": 3, "seconds": 1.5})
    write("finetune", "arts", "20260102-000000-bbbbbb", None)
    write("pretrain", "fhckm", "20260103-000000-cccccc", {"metrics": {}, "best_epoch": 9, "seconds": 2.5})
    write("finetune", "arts", "20260104-000000-dddddd", {"metrics": metrics, "best_epoch": 4, "seconds": 1.0})
    (tmp_path / "runs/finetune/arts/20260104-000000-dddddd/result.json").write_text("{")
    return tmp_path


def test_every_run_is_listed_with_its_main_metric_newest_first(workspace, capsys):
    assert main(["runs", "--json", "--workspace", str(workspace)]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)["runs"]
    assert [(row["run"], row["state"]) for row in rows] == [
        ("dddddd", "damaged"),
        ("cccccc", "finished"),
        ("bbbbbb", "unfinished"),
        ("aaaaaa", "finished"),
    ]
    assert rows[3]["metric"] == "NDCG@10"
    assert (rows[3]["valid"], rows[3]["test"], rows[3]["best_epoch"]) == (0.25, 0.125, 3)
    assert rows[1]["metric"] is None
    assert err.startswith("warning: ")


def test_the_table_ends_with_what_to_type_next(workspace, capsys):
    assert main(["runs", "--workspace", str(workspace)]) == 0
    out = capsys.readouterr().out
    assert "0.1250" in out
    assert out.splitlines()[-1] == f"next: mmm4rec evaluate --run aaaaaa --workspace {workspace}"


def test_curves_are_drawn_and_an_unfinished_run_is_to_be_gone_on_with(workspace, capsys):
    unfinished = workspace / "runs/finetune/arts/20260102-000000-bbbbbb"
    rows = [{"epoch": n, "loss": 3 - n, "valid": {"NDCG@10": n / 4}} for n in (1, 2, 3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (unfinished / "metrics.jsonl").write_text(text + '{"epoch": 4, "lo')
    for name in ("pantry/20260101-000000-aaaaaa", "arts/20260104-000000-dddddd"):
        shutil.rmtree(workspace / "runs/finetune" / name)
    assert main(["runs", "--workspace", str(workspace)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "▁▅█" in out
    assert f"next: mmm4rec finetune --domain arts --resume bbbbbb --workspace {workspace}" in out
    (unfinished / "metrics.jsonl").write_text("{}\n")
    assert main(["runs", "--workspace", str(workspace)]) == 0
    assert "metrics.jsonl is damaged" in capsys.readouterr().err


def test_one_domain_can_be_asked_for(workspace, capsys):
    assert main(["runs", "--json", "--domain", "pantry", "--workspace", str(workspace)]) == 0
    assert [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]] == ["aaaaaa"]
    assert main(["runs", "--domain", "pantri", "--workspace", str(workspace)]) == 2
    assert "pantry" in capsys.readouterr().err


def test_an_empty_workspace_is_no_error(tmp_path, capsys):
    assert main(["runs", "--workspace", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_the_list_is_made_from_json_alone(workspace):
    """Loading torch takes seconds, listing runs none."""
    code = (
        "import sys\nfrom mmm4rec_cli.app import main\n"
        f"assert main(['runs', '--quiet', '--workspace', {str(workspace)!r}]) == 0\n"
        "print(sorted({'torch', 'pyarrow', 'numpy', 'polars', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
