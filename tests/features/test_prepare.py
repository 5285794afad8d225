import gc
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from PIL import Image

from mmm4rec_cli.errors import DeviceError
from mmm4rec_cli.features import prepare
from mmm4rec_cli.features.encoders import load_encoder
from mmm4rec_cli.features.prepare import Job, Pictures, Texts, n_processes, prepared
from mmm4rec_cli.settings.schema import FeatureSettings


def edge(image):
    return {"edge": np.array([image.width, image.height])}


def lengths(texts):
    return {"length": np.array([len(text) for text in texts])}


def dies(image):
    os.kill(os.getpid(), signal.SIGKILL)


PREPARERS = {"text": Texts(lengths), "image": Pictures(edge)}


@pytest.fixture
def jobs(tmp_path):
    for number in range(8):
        Image.new("RGB", (10 + number, 5), "teal").save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"\x89PNG but no more")
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    return [
        Job("text", ["a", "bcd"]),
        *(Job("image", paths[first : first + 2]) for first in (0, 2, 4, 6)),
        Job("image", [None]),
    ]


def taken(results):
    return [
        (
            None if one.arrays is None else {key: np.asarray(value).tolist() for key, value in one.arrays.items()},
            one.failed,
        )
        for one in results
    ]


@pytest.mark.parametrize("method", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_threads_and_processes_give_the_same_in_the_same_order(jobs, method, monkeypatch, reporter):
    if method is not None:
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    with prepared(iter(jobs), PREPARERS, 0 if method is None else 2, reporter) as results:
        found = taken(results)
    assert found[0] == ({"length": [1, 3]}, {})
    assert found[1] == ({"edge": [[10, 5], [11, 5]]}, {})
    assert found[2][0] == {"edge": [[12, 5]]}
    assert list(found[2][1]) == [1]
    assert "3.png\t" in found[2][1][1]
    assert found[5] == ({"edge": [[200, 200]]}, {})
    gc.collect()
    assert multiprocessing.active_children() == []


def test_whoever_stops_early_leaves_no_process(jobs, monkeypatch, reporter):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")

    def interrupted():
        with prepared(iter(jobs * 50), PREPARERS, 2, reporter) as results:
            next(results)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    gc.collect()
    for _ in range(50):
        if not multiprocessing.active_children():
            break
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def test_a_process_that_dies_is_a_device_error_with_a_way_out(jobs, monkeypatch, reporter):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: "fork")
    preparers = {"text": Texts(lengths), "image": Pictures(dies)}
    with (
        pytest.raises(DeviceError, match="ended on its own") as caught,
        prepared(iter(jobs), preparers, 1, reporter) as results,
    ):
        taken(results)
    assert "features.workers=0" in caught.value.hint


def test_without_shared_memory_threads_do_it_and_that_is_said(jobs, monkeypatch, reporter):
    monkeypatch.setattr(prepare, "_shared_memory", lambda: False)
    with prepared(iter(jobs), PREPARERS, 2, reporter) as results:
        assert len(taken(results)) == len(jobs)
        assert multiprocessing.active_children() == []
    assert any("shared memory" in text for text in reporter.notes)


def test_processes_are_for_many_inputs_beside_a_gpu_unless_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(prepare, "cores", lambda: 16)
    auto = FeatureSettings()
    assert n_processes(auto, 100_000, on_gpu=True) == 16
    assert n_processes(auto, 100, on_gpu=True) == 0
    assert n_processes(auto, 100_000, on_gpu=False) == 0
    assert n_processes(FeatureSettings(workers=3), 1, on_gpu=False) == 3


def test_a_picture_larger_than_the_memory_is_one_that_cannot_be_read(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def starved(image):
        raise MemoryError

    ready = Pictures(starved)([tmp_path / "a.png"])
    assert ready.arrays is None
    assert "memory" in ready.failed[0]


class Starved:
    """A model that takes at most so many inputs at once."""

    def __init__(self, model, most):
        self._model, self._most = model, most
        self.seen = []

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, **inputs):
        import torch

        n = len(next(iter(inputs.values())))
        self.seen.append(n)
        if n > self._most:
            raise torch.OutOfMemoryError("no room")
        return self._model(**inputs)


def test_a_batch_is_halved_when_memory_runs_out_and_that_is_said_once(model, reporter):
    encoder = load_encoder(FeatureSettings(text_model=model("bert"), image_model="sketch"), "cpu", reporter)
    texts = [f"{'mouse ' * (number % 3)}book" for number in range(9)]
    tokens = encoder.text.preparer(texts)
    expected = next(encoder.text.stream([tokens]))
    loaded = encoder.text._loaded
    loaded.model = Starved(loaded.model, most=3)
    first, second = encoder.text.stream([tokens, tokens])
    assert loaded.model.seen == [9, 5, 3, 3, 3, 3, 3, 3]
    np.testing.assert_allclose(first, expected, atol=1e-6)
    np.testing.assert_array_equal(second, first)
    assert len([text for text in reporter.notes if "out of memory" in text and "9 at once" in text]) == 1
    loaded.model = Starved(loaded.model, most=0)
    with pytest.raises(DeviceError, match="out of memory on cpu, even for one"):
        next(encoder.text.stream([tokens]))


@pytest.mark.parametrize(("precision", "numbers", "tolerance"), [("tf32", "tf32", 1e-6), ("bf16", "bfloat16", 2e-2)])
def test_another_precision_is_another_fingerprint_and_nearly_the_same_vectors(
    model, reporter, precision, numbers, tolerance
):
    pair = {"encoder": model("siglip")}
    plain = load_encoder(FeatureSettings(**pair), "cpu", reporter)
    other = load_encoder(FeatureSettings(**pair, precision=precision), "cpu", reporter)
    assert other.identity["text"] == plain.identity["text"] | {"dtype": numbers}
    assert other.identity["image"] == plain.identity["image"] | {"dtype": numbers}
    texts = ["red cotton scarf", "a book about cats"]
    np.testing.assert_allclose(other.text.texts(texts), plain.text.texts(texts), atol=tolerance)
    picture = [plain.image.prepare(Image.effect_noise((40, 30), 70).convert("RGB"))]
    np.testing.assert_allclose(other.image.images(picture), plain.image.images(picture), atol=tolerance)
    assert other.text.texts(texts).dtype == np.float32
