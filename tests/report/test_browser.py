"""The report in a real browser: no complaint on the console, pictures load, tables sort."""

import base64
import hashlib
import re
import shutil
import subprocess

import pytest

from mmm4rec_cli.app import main

CHROMIUM = shutil.which("chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--dump-dom"),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not here: apt-get install chromium"),
]


@pytest.fixture
def page(workspace, make_domain, small_settings, tmp_path):
    from PIL import Image

    from mmm4rec_cli.data.tables import read_tables, write_images
    from mmm4rec_cli.training.finetune import finetune

    make_domain("ring", users=30)
    Image.new("RGB", (300, 400), "olive").save(workspace.root / "picture.png")
    finetune(workspace, "ring", small_settings(), pretrained="none")
    items = read_tables(workspace, "ring").n_items
    write_images(workspace, "ring", ["picture.png" if i % 3 else None for i in range(items)])
    out = tmp_path / "report.html"
    assert main(["report", "--workspace", str(workspace.root), "--out", str(out), "--quiet"]) == 0
    return out


def browse(path, tmp_path, fragment=""):
    """The document after its scripts ran, and what the browser wrote on its console."""
    profile = tmp_path / "profile"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"{path.as_uri()}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def column(dom, table, index):
    body = re.search(rf'id="{table}".*?<tbody>(.*?)</tbody>', dom, re.DOTALL).group(1)
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)[index] for row in rows]


def test_tables_sort_and_the_console_stays_silent(page, tmp_path):
    plain, console = browse(page, tmp_path)
    assert console == []
    assert plain.count("<button") >= 6
    names = column(plain, "metrics", 0)
    assert names[0] == "Hit@5"
    dom, console = browse(page, tmp_path, "#sort=metrics.2")
    assert console == []
    values = [float(value) for value in column(dom, "metrics", 2)]
    assert values == sorted(values, reverse=True)
    assert 'aria-sort="descending"' in dom
    dom, _ = browse(page, tmp_path, "#sort=metrics.0")
    assert column(dom, "metrics", 0) == ["NDCG@10", "NDCG@5", "MRR", "Hit@10", "Hit@5"] != names


def with_probe(page, probe, tmp_path):
    """A copy of the page that runs one more script, admitted by its policy."""
    digest = base64.b64encode(hashlib.sha256(probe.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    copy = tmp_path / "probed.html"
    copy.write_text(text.replace("</body>", f"<script>{probe}</script></body>"), encoding="utf-8")
    return copy


def test_every_picture_loads_and_a_click_sorts_both_ways(page, tmp_path):
    probe = """addEventListener("load", () => {
      const images = [...document.images];
      const button = document.querySelector("#metrics thead tr:last-child th:nth-child(3) button");
      const first = () => document.querySelector("#metrics tbody tr td:nth-of-type(2)").textContent;
      button.click(); const falling = first(); button.click(); const rising = first();
      const loaded = images.filter(i => i.complete && i.naturalWidth > 0);
      document.title = `${images.length} ${loaded.length} ${falling} ${rising}`;
    });"""
    dom, console = browse(with_probe(page, probe, tmp_path), tmp_path)
    assert console == []
    images, loaded, falling, rising = re.search(r"<title>(.*?)</title>", dom).group(1).split()
    assert images == loaded != "0"
    assert float(falling) > float(rising)


def test_the_policy_stops_foreign_scripts_and_the_test_would_see_it(page, tmp_path):
    copy = tmp_path / "foreign.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", "<script>document.title='owned'</script></body>"), encoding="utf-8")
    dom, console = browse(copy, tmp_path)
    assert "<title>owned" not in dom
    assert len(console) == 1
    assert "Content Security Policy" in console[0]


def test_nothing_sticks_out_at_360_pixels(page, tmp_path):
    frame = tmp_path / "frame.html"
    probe = """addEventListener("load", () => {
      const e = document.documentElement;
      parent.postMessage(`${innerWidth} pixels, ${e.scrollWidth - e.clientWidth} too wide`, "*");
    });"""
    copy = with_probe(page, probe, tmp_path)
    frame.write_text(
        '<title>waiting</title><script>addEventListener("message",e=>{document.title=e.data})</script>'
        f'<iframe src="{copy.as_uri()}" style="border:0;width:360px;height:3000px"></iframe>',
        encoding="utf-8",
    )
    dom, _ = browse(frame, tmp_path)
    assert "<title>360 pixels, 0 too wide</title>" in dom
