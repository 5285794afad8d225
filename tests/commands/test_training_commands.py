"""pretrain, finetune, evaluate and runs, typed as a user types them."""

import json

import pytest

from mmm4rec_cli.app import main

SETTINGS = """
[model]
hidden_size = 16
inner_size = 16
d_state = 4
head_dim = 4
max_len = 6
[pretrain]
epochs = 1
batch_size = 64
[finetune]
epochs = 2
batch_size = 64
accumulation = 1
lr = 0.005
metric = "Hit@10"
[runtime]
device = "cpu"
"""


@pytest.fixture
def shop(workspace, make_domain):
    for name, seed in (("ring", 0), ("other", 1)):
        make_domain(name, users=25, seed=seed)
    workspace.config.write_text(SETTINGS)
    return ["--workspace", str(workspace.root)]


def run(capsys, *words):
    code = main([*words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_chain_from_pretraining_to_evaluation(shop, workspace, capsys):
    code, out, err = run(capsys, "pretrain", "--domain", "ring", "--domain", "other", *shop)
    assert code == 0
    assert "pre-trained on ring+other: 1 epochs" in out
    assert "epoch 1/1" in err
    assert "loss  ▅" in out
    assert f"next: mmm4rec finetune --domain other --workspace {workspace.root}" in out
    code, out, err = run(capsys, "finetune", "--domain", "ring", *shop)
    assert code == 0
    assert "from 2" in out
    assert "popularity, test" in out
    assert "valid Hit@10" in out
    following = out.splitlines()[-1].removeprefix("next: ").split()
    assert following[:3] == ["mmm4rec", "evaluate", "--run"]
    assert following[4:] == ["--workspace", str(workspace.root)]
    assert "starting from pre-training run" in err
    code, out, _ = run(capsys, "evaluate", "--k", "1,5", "--mask-seen", *shop)
    assert code == 0
    assert all(name in out for name in ("Hit@1", "Hit@5", "NDCG@5", "MRR", "all items", "popularity"))
    assert "valid Hit@10" in out
    assert "next: mmm4rec report --run" in out
    code, out, _ = run(capsys, "runs", *shop)
    assert code == 0
    assert out.count("finished") == 2


def test_json_holds_the_documented_keys_and_nothing_else_is_printed(shop, capsys):
    code, out, _ = run(capsys, "finetune", "--domain", "ring", "--pretrained", "none", "--json", *shop)
    assert code == 0
    result = json.loads(out)
    assert {"run", "domain", "model", "best_epoch", "epochs", "seconds", "pretrained", "metrics", "seeds"} <= set(
        result
    )
    assert set(result["metrics"]) == {"valid", "test"}
    code, out, err = run(capsys, "evaluate", "--json", "--quiet", "--split", "valid", *shop)
    assert (code, err) == (0, "")
    document = json.loads(out)
    keys = {"run", "domain", "split", "model", "n_users", "n_items", "metrics", "ties", "mask_seen", "segments"}
    assert keys <= set(document)
    assert document["metrics"] == result["metrics"]["valid"]


def test_no_item_bias_is_a_setting_of_the_run(shop, capsys, workspace):
    code, _, _ = run(capsys, "finetune", "--domain", "ring", "--no-item-bias", "--epochs", "1", *shop)
    assert code == 0
    saved = json.loads(next(workspace.runs.glob("finetune/ring/*/settings.json")).read_text())
    assert saved["model"]["item_bias"] is False
    assert saved["finetune"]["epochs"] == 1
    code, _, err = run(capsys, "evaluate", "--set", "model.item_bias=true", *shop)
    assert code == 2
    assert "model.item_bias (--set model.item_bias): true, but" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["finetune", "--domain", "rong"], 2, "ring"),
        (["finetune", "--domain", "ring", "--model", "gru"], 2, "gru"),
        (["finetune", "--domain", "ring", "--set", "finetune.lrr=1"], 2, "finetune.lr"),
        (["finetune", "--domain", "ring", "--encoder", "clip"], 3, "preprocess"),
        (["finetune", "--domain", "scientific"], 3, "mmm4rec download --domain scientific"),
        (["pretrain"], 3, "mmm4rec download --mix fhckm"),
        (["pretrain", "--mix", "fhckm", "--domain", "ring"], 2, "exclude one another"),
        (["finetune", "--domain", "ring", "--pretrained", "abc"], 4, "abc"),
        (["finetune", "--domain", "ring", "--resume", "abc"], 4, "abc"),
        (["evaluate"], 4, "mmm4rec finetune"),
        (["evaluate", "--run", "zzz"], 4, "zzz"),
        (["finetune", "--domain", "ring", "--device", "cuda:7"], 5, "doctor"),
        (["finetune", "--domain", "ring", "--device", "tpu"], 2, "tpu"),
    ],
)
def test_bad_input_has_its_exit_code_and_says_what_to_do(shop, capsys, workspace, words, code, said):
    got, out, err = run(capsys, *words, *shop)
    assert got == code
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert not list(workspace.runs.glob("*/*/*"))
