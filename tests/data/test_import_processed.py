import json

import numpy as np
import pytest
import torch

from mmm4rec_cli.app import main
from mmm4rec_cli.data.import_processed import import_processed
from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.features.store import read_features


def write_published(folder, tables, features, *, pretraining=False, as_object=False):
    """Tables and features in the published layout, as its description says."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = np.searchsorted(tables.user_id, np.arange(tables.n_users + 1))
    lines = {"train": [], "eval": [], "test": []}
    for user in range(tables.n_users):
        rows = slice(starts[user], starts[user + 1])
        events = [
            list(pair) for pair in zip(tables.item_id[rows].tolist(), tables.timestamp[rows].tolist(), strict=True)
        ]
        last = len(events) if pretraining else len(events) - 2
        lines["train"] += [[user, events[:n]] for n in range(2, last + 1)]
        lines["eval"].append([user, events[:-1]])
        lines["test"].append([user, events])
    for name in ("train",) if pretraining else lines:
        (folder / f"{name}_seq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[name]))
    for name, raw, first in (("item2id", tables.raw_item_ids, 1), ("user2id", tables.raw_user_ids, 0)):
        pairs = [(key, number) for number, key in enumerate(raw, first)]
        text = json.dumps(dict(pairs)) if as_object else "".join(json.dumps(pair) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(text)
    torch.save(torch.from_numpy(features.text[1:]), folder / "text_feat.pth")
    torch.save(torch.from_numpy(features.image[1:]), folder / "image_feat.pth")


@pytest.fixture
def published(workspace, make_domain, tmp_path):
    make_domain("ring")
    tables = read_tables(workspace, "ring")
    path = workspace.features("ring", "test")
    features = read_features(path, tables.catalogue, tables.n_items)
    folder = tmp_path / "Ring"
    write_published(folder, tables, features)
    return folder, tables, features


@pytest.mark.parametrize(("pretraining", "as_object"), [(False, False), (False, True), (True, False)])
def test_the_published_layout_gives_back_tables_and_features(workspace, published, pretraining, as_object):
    folder, tables, features = published
    folder = folder.with_name("Again")
    write_published(folder, tables, features, pretraining=pretraining, as_object=as_object)
    manifest = import_processed(workspace, "again", folder, "published")
    again = read_tables(workspace, "again")
    for name in ("user_id", "item_id", "timestamp"):
        np.testing.assert_array_equal(getattr(again, name), getattr(tables, name))
    assert (again.raw_item_ids, again.raw_user_ids) == (tables.raw_item_ids, tables.raw_user_ids)
    assert manifest["pretraining_set"] is pretraining
    back = read_features(workspace.features("again", "published"), again.catalogue, again.n_items)
    np.testing.assert_array_equal(back.text, features.text)
    np.testing.assert_array_equal(back.image, features.image)


def test_the_command_takes_a_folder_and_prints_its_manifest(workspace, published, capsys):
    folder, tables, _ = published
    words = ("preprocess", "--import-processed", str(folder), "--domain", "again", "--workspace", str(workspace.root))
    assert main([*words, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["users"] == tables.n_users
    assert "not to be recovered" in captured.err
    assert main(["preprocess", "--import-processed", str(folder), "--workspace", str(workspace.root)]) == 2


def drop_line(name):
    def change(folder):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[1:]))

    return change


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "train_seq.jsonl").unlink(), "train_seq.jsonl is missing"),
        (lambda folder: (folder / "eval_seq.jsonl").unlink(), "belong together"),
        (drop_line("eval_seq.jsonl"), "users"),
        (drop_line("test_seq.jsonl"), "is not in test_seq.jsonl"),
        (write("train_seq.jsonl", b"[0, [[1, 5], [2, 6]]]\n"), "line 1: no beginning of user 0"),
        (write("train_seq.jsonl", b"[0, [[1, 5], [2, 4]]]\n"), "backwards"),
        (write("train_seq.jsonl", b"[0, [[0, 5]]]\n"), "line 1: not"),
        (write("train_seq.jsonl", b'{"a": 1}\n'), "line 1: not"),
        (write("train_seq.jsonl", b"\xff\n"), "not UTF-8"),
        (write("item2id.jsonl", b'["a", 1]\n["b", 3]\n'), "without a gap"),
        (write("item2id.jsonl", b"nonsense"), "not raw ids"),
        (write("item2id.jsonl", b'["a", 1]\n'), "item2id ends at 1"),
        (write("text_feat.pth", b"no tensors"), "damaged"),
        (lambda folder: torch.save({"a": Evil()}, folder / "text_feat.pth"), "damaged, or not tensors alone"),
        (lambda folder: torch.save(torch.ones(3, 4), folder / "image_feat.pth"), "3 rows for 25 items"),
        (lambda folder: torch.save(torch.full((25, 4), torch.nan), folder / "image_feat.pth"), "NaN"),
        (lambda folder: torch.save(torch.ones(25), folder / "image_feat.pth"), "not one row of numbers"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused_and_nothing_is_written(workspace, published, change, says):
    folder, _, _ = published
    change(folder)
    with pytest.raises(DataError, match=says):
        import_processed(workspace, "again", folder, "published")
    assert not workspace.processed("again").exists()
