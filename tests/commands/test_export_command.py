"""export, typed as a user types it."""

import json

from mmm4rec_cli.app import main
from mmm4rec_cli.training.finetune import finetune


def test_the_newest_run_is_written_into_its_folder_or_a_named_one(
    workspace, make_domain, small_settings, capsys, tmp_path
):
    make_domain()
    where = ["--workspace", str(workspace.root)]
    assert main(["export", *where]) == 4
    assert "mmm4rec finetune" in capsys.readouterr().err
    finetune(workspace, "ring", small_settings(finetune={"epochs": 1}), pretrained="none")
    assert main(["export", *where]) == 0
    assert "item_table.safetensors" in capsys.readouterr().out
    assert len(list(workspace.runs.glob("finetune/ring/*/export/safetensors/*"))) == 5
    assert main(["export", "--json", "--quiet", "--out", str(tmp_path / "o"), *where]) == 0
    document = json.loads(capsys.readouterr().out)
    assert all((tmp_path / "o" / name).is_file() for name in document["files"])
    assert main(["export", "--format", "pickle", *where]) == 2
    assert main(["export", "--run", "zzz", *where]) == 4
    for file in workspace.processed("ring").iterdir():
        file.unlink()
    assert main(["export", *where]) == 4
