"""The numbers of `preprocess --stats`, held to counts on plain lists."""

import json
from collections import Counter

import numpy as np
import pytest

from mmm4rec_cli.app import main
from mmm4rec_cli.data.statistics import EDGES, describe
from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError


def test_they_are_those_of_plain_counting(workspace, make_domain):
    make_domain(users=80, items=9)
    found = describe(workspace, "ring")
    tables = read_tables(workspace, "ring")
    rows = list(zip(tables.user_id.tolist(), tables.item_id.tolist(), tables.timestamp.tolist(), strict=True))
    lengths = Counter(user for user, _, _ in rows)
    moments = Counter((user, time) for user, _, time in rows)
    assert (found["users"], found["items"], found["interactions"]) == (80, 9, len(rows))
    assert found["tied_share"] == pytest.approx(sum(moments[user, time] > 1 for user, _, time in rows) / len(rows))
    assert found["repeated_share"] == pytest.approx(1 - len({row[:2] for row in rows}) / len(rows))
    assert 0 < found["repeated_share"] < 1
    per_user = found["per"]["user"]
    assert per_user["mean"] == pytest.approx(np.mean(list(lengths.values())))
    expected = np.quantile(list(lengths.values()), [0.05, 0.25, 0.5, 0.75, 0.95], method="lower")
    assert [per_user[name] for name in ("5%", "25%", "50%", "75%", "95%")] == expected.tolist()
    bins = Counter(max(edge for edge in EDGES if edge <= length) for length in lengths.values())
    assert [row["users"] for row in found["histogram"]] == [bins[edge] for edge in EDGES if edge in bins]
    assert [row["length"] for row in found["histogram"]] == ["3-4", "5", "6-7", "8-9", "10-14"]
    assert (found["text_share"], found["image_share"], found["published"]) == (1.0, 0.0, None)
    assert found["first"] == "2017-07-14"


def test_without_names_every_domain_with_tables_is_described(workspace, make_domain, capsys):
    make_domain("ring")
    make_domain("scientific")
    assert main(["preprocess", "--stats", "--workspace", str(workspace.root), "--json"]) == 0
    documents = json.loads(capsys.readouterr().out)["domains"]
    assert [document["domain"] for document in documents] == ["scientific", "ring"]
    assert documents[0]["published"] == {"users": 8442, "items": 4385}


def test_the_terminal_shows_sizes_beside_the_published_ones_and_a_histogram(workspace, make_domain, capsys):
    make_domain("scientific")
    assert main(["preprocess", "--stats", "scientific", "--workspace", str(workspace.root)]) == 0
    out, _ = capsys.readouterr()
    assert "8,442" in out
    assert "-8,382" in out
    assert "█" in out
    assert "tied in time" in out


@pytest.mark.parametrize(("words", "code"), [(["nosuch"], 2), (["pantry"], 3), ([], 3)])
def test_a_domain_that_is_not_there_is_refused(words, code, workspace, capsys):
    assert main(["preprocess", "--stats", *words, "--workspace", str(workspace.root)]) == code
    assert "hint: " in capsys.readouterr().err


def test_damaged_tables_are_a_data_error(workspace, make_domain):
    make_domain()
    (workspace.processed("ring") / "items.parquet").write_bytes(b"no Parquet")
    with pytest.raises(DataError, match="cannot be read"):
        describe(workspace, "ring")
