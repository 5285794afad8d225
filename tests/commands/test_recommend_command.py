"""recommend, typed as a user types it."""

import json

import pyarrow.parquet as pq
import pytest

from mmm4rec_cli.app import main
from mmm4rec_cli.training.finetune import finetune


@pytest.fixture
def shop(workspace, make_domain, small_settings):
    make_domain()
    finetune(workspace, "ring", small_settings(finetune={"epochs": 1}), pretrained="none")
    return ["--workspace", str(workspace.root), "--device", "cpu"]


def run(capsys, *words):
    code = main(["recommend", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_user_a_history_and_neighbours_are_shown(shop, capsys):
    code, out, _ = run(capsys, "--user", "u001", "--k", "3", *shop)
    assert code == 0
    assert "for u001" in out
    assert "next: mmm4rec recommend --run" in out
    code, out, err = run(capsys, "--history", "i001,i002", "--at", "2020-01-01", *shop)
    assert code == 0
    assert "--at changes nothing" in err
    code, out, _ = run(capsys, "--similar", "i001", *shop)
    assert code == 0
    assert "similar to i001" in out


def test_json_holds_the_documented_keys_and_nothing_else_is_printed(shop, capsys):
    code, out, err = run(capsys, "--user", "u001", "--k", "4", "--json", "--quiet", *shop)
    assert (code, err) == (0, "")
    (one,) = json.loads(out)["users"]
    assert one["user"] == "u001"
    assert len(one["items"]) == 4
    assert set(one["items"][0]) == {"raw_item_id", "score", "title", "text_score", "image_score"}


def test_a_file_of_users_becomes_a_file_of_answers(shop, capsys, tmp_path):
    (tmp_path / "users.csv").write_text("user\n" + "".join(f"u{i:03d}\n" for i in range(60)))
    out_file = tmp_path / "out.parquet"
    code, out, _ = run(
        capsys, "--users", str(tmp_path / "users.csv"), "--out", str(out_file), "--set", "evaluate.batch_size=7", *shop
    )
    assert code == 0
    assert "60 users" in out
    table = pq.read_table(out_file)
    assert table.schema.names == ["user", "rank", "raw_item_id", "score", "text_score", "image_score"]
    assert table.num_rows == 600
    (tmp_path / "users.csv").write_text("user\nu001\nnobody\n")
    code, _, err = run(
        capsys, "--users", str(tmp_path / "users.csv"), "--out", str(tmp_path / "no.csv"), "--quiet", *shop
    )
    assert code == 3
    assert "row 2: user 'nobody'" in err
    assert not (tmp_path / "no.csv").exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "nobody to recommend to"),
        (["--user", "u001", "--history", "i001"], 2, "exclude one another"),
        (["--user", "u001", "--times", "1"], 2, "--history"),
        (["--user", "u001", "--k", "0"], 2, "--k 0"),
        (["--user", "u001", "--out", "x.xlsx"], 2, ".parquet"),
        (["--user", "u001", "--at", "soon"], 2, "soon"),
        (["--user", "u001x"], 3, "u001"),
        (["--history", "i001x"], 3, "i001"),
        (["--history", ","], 3, "empty"),
        (["--similar", "i001x"], 3, "i001"),
        (["--users", "nowhere.csv"], 3, "nowhere.csv"),
        (["--user", "u001", "--exclude", "nowhere.txt"], 3, "nowhere.txt"),
        (["--user", "u001", "--run", "zzz"], 4, "zzz"),
        (["--user", "u001", "--device", "tpu"], 2, "tpu"),
    ],
)
def test_bad_input_has_its_exit_code_and_says_what_to_do(shop, capsys, words, code, said):
    got, out, err = run(capsys, *shop, *words)
    assert got == code
    assert out == ""
    assert said in err
    assert "Traceback" not in err


def test_new_items_are_encoded_by_the_run_s_encoder_and_double_ones_refused(
    workspace, make_domain, small_settings, shop, capsys, tmp_path
):
    from mmm4rec_cli.features.extract import extract_features

    settings = small_settings(features={"encoder": "sketch"}, finetune={"epochs": 1})
    extract_features(workspace, "ring", settings.features)
    finetune(workspace, "ring", settings, pretrained="none")
    file = tmp_path / "new.csv"
    file.write_text("item_id,title,description\nn1,A small lamp,For the desk\n")
    words = ["--user", "u001", "--new-items", str(file), "--k", "26", "--include-seen", "--json", *shop]
    code, out, err = run(capsys, *words)
    assert code == 0
    assert "item bias" in err
    (one,) = json.loads(out)["users"]
    assert {item["raw_item_id"]: item["title"] for item in one["items"]}["n1"] == "A small lamp"
    file.write_text("item_id,title\nn1,A\nn1,B\n")
    assert run(capsys, *words)[0] == 3
    file.write_text("item_id,title\ni001,A lamp\n")
    code, out, _ = run(capsys, *words)
    assert code == 3
    assert "i001" in json.loads(out)["error"]["message"]
