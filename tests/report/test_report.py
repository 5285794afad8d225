"""The report page: self-contained, escaped, ordered, and true to the run's files."""

import html.parser
import json
import re
from itertools import pairwise

import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmm4rec_cli.app import main
from mmm4rec_cli.data.tables import read_tables, write_tables
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.report.gallery import data_uri
from mmm4rec_cli.report.weighing import score_parts
from mmm4rec_cli.runs import Run, all_runs
from mmm4rec_cli.training.finetune import finetune

HOSTILE = "<script>alert('x')</script> & \"quoted\""


class Page(html.parser.HTMLParser):
    """Tags with their attributes, headings, and addresses."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def shop(workspace, make_domain, small_settings):
    """A domain with hostile titles, a picture, a missing picture and a broken one, and two finished runs."""
    make_domain("ring", users=40)
    tables = read_tables(workspace, "ring")
    folder = workspace.root / "pictures"
    folder.mkdir()
    Image.new("RGB", (900, 1200), "teal").save(folder / "good.png")
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    paths = ["pictures/good.png", "pictures/gone.png", "pictures/broken.jpg", None]
    items = tables.items.to_pydict()
    items["image"] = [paths[i % 4] for i in range(tables.n_items)]
    items["title"] = [HOSTILE if i % 2 else None for i in range(tables.n_items)]
    processed = workspace.processed("ring")
    write_tables(
        workspace,
        "ring",
        interactions=pq.read_table(processed / "interactions.parquet"),
        items=tables.items.__class__.from_pydict(items, schema=tables.items.schema),
        users=pq.read_table(processed / "users.parquet"),
        manifest={"domain": "ring", "counts": [{"step": HOSTILE, "users": 40, "items": 25, "rows": 300}]},
    )
    for seed in (1, 2):
        finetune(workspace, "ring", small_settings(runtime={"device": "cpu", "seed": seed}), pretrained="none")
    return workspace


@pytest.fixture
def report(shop, tmp_path, capsys):
    def make(*words):
        out = tmp_path / "out" / "page.html"
        code = main(["report", "--workspace", str(shop.root), "--out", str(out), "--quiet", *words])
        assert code == 0, capsys.readouterr().err
        return out.read_text(encoding="utf-8")

    return make


def test_the_page_needs_nothing_from_outside(report):
    page = Page(report())
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,")), (name, value)
    assert not page.all("link")
    assert "@import" not in report()
    policy = page.all("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-eval" not in policy
    assert page.all("html") == [{"lang": "en"}]


def test_ids_are_unique_and_every_reference_has_its_target(report):
    text = report()
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    wanted |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted <= set(ids)


def test_hostile_titles_stay_text(report):
    text = report()
    assert len(Page(text).all("script")) == 1
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; &#34;quoted&#34;" in text


def test_headings_go_down_one_step_at_a_time_and_tables_are_described(report):
    page = Page(report())
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert all("scope" in head for head in page.all("th"))
    assert all("alt" in image for image in page.all("img"))
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.all("svg"))


def test_the_metrics_are_those_of_the_run(report, shop):
    run = next(all_runs(shop))
    text = report()
    for name, value in run.result["metrics"]["test"].items():
        row = re.search(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', text).group(1)
        assert f"{value:.4f}" in row
    assert run.id in text
    assert "finetune.metric" in text  # a setting that differs from its default
    assert "best epoch" in text


def test_runs_stand_side_by_side(report, shop):
    runs = list(all_runs(shop))
    text = report("--run", runs[0].short_id, "--run", runs[1].short_id)
    page = Page(text)
    blocks = [head for head in page.all("th") if head.get("scope") == "colgroup"]
    assert [block["colspan"] for block in blocks[:2]] == ["4", "4"]
    for run in runs:
        assert run.short_id in text
        assert f"{run.result['metrics']['valid']['MRR']:.4f}" in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_segments_of_several_runs_stand_side_by_side_as_plots_and_figures(report, shop):
    from mmm4rec_cli.evaluation.evaluate_run import evaluate_run

    runs = list(all_runs(shop))
    text = report(*(f"--run={run.short_id}" for run in runs), "--by", "modality,length")
    assert re.findall(r'<table class="sortable" id="segments-(\w+)"', text) == ["modality", "length"]
    assert "New and known targets" not in text
    metric = re.search(r"Test (\S+) of parts", text).group(1)
    body = re.search(r'id="segments-length".*?<tbody>(.*?)</tbody>', text, re.DOTALL).group(1)
    segments = [evaluate_run(shop, run, run.settings, segments=["length"])["segments"]["length"] for run in runs]
    for group in segments[0]:
        cells = re.search(rf'<th scope="row">{re.escape(group)}</th>(.*?)</tr>', body).group(1)
        want = [text for one in segments for text in (f"{one[group]['n_users']:,}", f"{one[group][metric]:.4f}")]
        assert re.findall(r"<td[^>]*>(.*?)</td>", cells) == want


def test_unknown_segments_are_refused(shop, capsys):
    assert main(["report", "--workspace", str(shop.root), "--by", "lenght"]) == 2
    assert "lenght" in capsys.readouterr().err


def test_a_published_domain_shows_the_published_row_beside_ours(workspace, make_domain, small_settings, tmp_path):
    make_domain("scientific", users=20)
    settings = small_settings(evaluate={"k": (5, 10, 20)}, finetune={"epochs": 1, "metric": "NDCG@10"})
    finetune(workspace, "scientific", settings, pretrained="none")
    assert main(["report", "--workspace", str(workspace.root), "--out", str(tmp_path / "r.html"), "--quiet"]) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    heads = re.findall(r'<th scope="col" class="n">(.*?)</th>', text)
    assert heads[:5] == ["valid", "test", "popularity", "repeat last", "published"]
    for name, value in (("Hit@10", "0.1348"), ("NDCG@20", "0.0847"), ("Hit@5", "–"), ("MRR", "–")):
        row = re.search(rf'<tr><th scope="row">{name}</th>(.*?)</tr>', text).group(1)
        assert re.findall(r"<td[^>]*>(.*?)</td>", row)[4] == value
    assert "published: 0.0724" in text
    assert "figures of the reference's own logs" in text
    assert "8,442 users, 4,385 items, item bias on, best epoch 13): not the same users and items as here" in text


def test_pictures_are_small_and_missing_ones_have_a_placeholder(report, shop):
    page = report()
    assert "data:image/jpeg;base64," in page
    assert '<span class="none">no picture</span>' in page
    assert len(data_uri(shop.root / "pictures" / "good.png")) < 10_000
    assert data_uri(shop.root / "pictures" / "gone.png") is None
    assert data_uri(shop.root / "pictures" / "broken.jpg") is None


def test_the_same_run_gives_the_same_page(report):
    assert report() == report()


def test_the_page_goes_into_the_run_and_json_says_where(shop, capsys):
    assert main(["report", "--workspace", str(shop.root), "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    run = next(all_runs(shop))
    assert document == {"report": str(run.path / "report.html"), "runs": [run.id]}
    assert (run.path / "report.html").is_file()


def test_ranks_are_counted_anew_where_the_stored_ones_are_gone(report, shop):
    before = report()
    (next(all_runs(shop)).path / "ranks.parquet").unlink()
    assert report() == before


def test_an_unfinished_run_is_refused(shop, capsys):
    run = next(all_runs(shop))
    (run.path / "result.json").unlink()
    code = main(["report", "--workspace", str(shop.root), "--run", run.short_id])
    out, err = capsys.readouterr()
    assert (code, out) == (4, "")
    assert f"run {run.id} is not finished" in err
    assert f"--resume {run.short_id}" in err
    assert not (run.path / "report.html").exists()


def test_no_run_a_run_twice_and_a_removed_domain_are_refused(shop, capsys, tmp_path):
    where = ["--workspace", str(shop.root)]
    run = next(all_runs(shop)).short_id
    assert main(["report", "--workspace", str(tmp_path / "empty")]) == 4
    assert main(["report", *where, "--run", run, "--run", run]) == 2
    (shop.processed("ring") / "manifest.json").unlink()
    assert main(["report", *where, "--run", run]) == 4
    assert "no longer there" in capsys.readouterr().err


def test_a_target_shown_in_the_top_ten_stands_at_its_rank(report):
    places = []
    for case in re.findall(r'<article class="case">(.*?)</article>', report(), re.DOTALL):
        place = int(re.search(r"target at place ([\d,]+)", case).group(1).replace(",", ""))
        marked = re.search(r"(\d+)\. [^<]*<span class=\"tag\">target", re.sub(r"\s+", " ", case))
        assert (int(marked.group(1)) if marked else None) == (place if place <= 10 else None)
        places.append(place)
    assert places == sorted(places)
    assert places[0] <= 10


def test_text_and_image_parts_add_up_to_the_item_table(shop, small_settings):
    from mmm4rec_cli.data.dataset import load_dataset

    settings = small_settings(model={"fusion": "instance"})
    features = load_dataset(shop, ["ring"], "test").model_features("mean")
    model = build_model("mmm4rec", settings.model, features)
    text, image = score_parts(model)
    assert (text + image - model.item_table()).abs().max() < 1e-6


def test_several_seeds_show_mean_and_spread(shop, small_settings, report):
    result = finetune(shop, "ring", small_settings(), pretrained="none", seeds=[3, 4])
    text = report()
    mrr, spread = result["metrics"]["test"]["MRR"], result["metrics_sd"]["test"]["MRR"]
    assert f"{mrr:.4f} ± {spread:.4f}" in text
    assert Run(next(all_runs(shop)).path).short_id in text


def test_a_published_domain_has_the_published_row_beside_ours_where_it_is_comparable(shop, small_settings):
    from mmm4rec_cli.report.gather import _metrics

    result = {**next(all_runs(shop)).result, "domain": "scientific"}
    assert _metrics(result, small_settings())["published"]["Hit@10"] == pytest.approx(0.134802)
    without = small_settings(model={"item_bias": False})
    assert _metrics(result, without)["published"]["NDCG@10"] == pytest.approx(0.0668, abs=5e-5)
    assert "published" not in _metrics(result, small_settings(data={"split": "temporal"}))
    assert "published" not in _metrics({**result, "domain": "ring"}, small_settings())
    assert "published" not in _metrics({**result, "model": "sasrec"}, small_settings()), "it is MMM4Rec's"
