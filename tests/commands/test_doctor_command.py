"""`mmm4rec doctor`."""

import json

from mmm4rec_cli.app import main


def test_json_has_the_shape_of_the_contract(tmp_path, capsys):
    assert main(["doctor", "--json", "--workspace", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    for states in found["backends"].values():
        for state in states.values():
            assert set(state) == {"available", "why"}
    assert {"python", "torch", "gpus", "backends", "encoders", "disk", "optional"} <= set(found)


def test_people_read_tables(tmp_path, capsys):
    assert main(["doctor", "--quiet", "--workspace", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in (
        "Python",
        "kernel backends",
        "causal_conv1d",
        "sketch",
        "free at",
        "faiss-cpu",
        "export --format onnx",
    ):
        assert word in out
    assert out.splitlines()[-1] == "next: mmm4rec demo --workspace demo"
    (tmp_path / "data" / "processed" / "tea").mkdir(parents=True)
    (tmp_path / "data" / "processed" / "tea" / "manifest.json").write_text("{}")
    assert main(["doctor", "--quiet", "--workspace", str(tmp_path)]) == 0
    assert f"next: mmm4rec finetune --domain tea --workspace {tmp_path}" in capsys.readouterr().out
