"""Encode drawn pictures and texts with a SigLIP-base of random weights: this library against the simple loop.

    python examples/benchmarks/embed.py --out results.jsonl

The simple loop is one process that opens, prepares and encodes batch after batch in float32. Needs torch, transformers,
sentencepiece, pyarrow, Pillow and pydantic; no weights and no network. `--tiny` tries the script out on a CPU.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = (
    *("red", "blue", "green", "cotton", "wool", "steel", "oak", "ceramic", "winter", "summer", "light", "heavy"),
    *("scarf", "mug", "chair", "lamp", "kettle", "wireless", "usb", "receiver", "dishwasher", "safe", "washable"),
    *("kitchen", "garden", "office", "travel", "set", "of", "two", "large", "small", "edition", "hand", "made"),
)


def draw(job):
    """Write some JPEGs of the size of a shop's pictures: soft colours, an edge, grain."""
    folder, numbers, side = job
    for number in numbers:
        rng = np.random.default_rng(number)
        width, height = (int(rng.integers(side * 7 // 10, side * 13 // 10)) for _ in range(2))
        soft = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((width, height), 3)
        tile = rng.normal(0, 9, (64, 64, 1)).astype(np.int16)
        grain = np.tile(tile, (height // 64 + 1, width // 64 + 1, 1))[:height, :width]
        pixels = np.asarray(soft, dtype=np.int16) + grain
        pixels[height // 4 : height // 2, width // 3 : width // 2] //= 2
        buffer = BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())


def sentences(count):
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randint(8, 60))) + f" number {index}" for index in range(count)]


def build(folder, tiny):
    import sentencepiece
    import torch
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel, SiglipTokenizer

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(2000)),
        model_prefix=str(folder / "spiece"),
        vocab_size=400,
        hard_vocab_limit=False,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**(small if tiny else {}), "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config=small if tiny else {})).save_pretrained(folder)
    SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    SiglipImageProcessorPil(resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)


class Watch:
    """A reporter that keeps when how much was done."""

    def __init__(self):
        self.stages, self.said = {}, []

    def note(self, text):
        self.said.append(text)

    warn = note

    @contextmanager
    def stage(self, name, total=None, unit=""):
        done = self.stages.setdefault(name, [(time.perf_counter(), 0)])

        class Progress:
            def advance(self, n=1, status=""):
                done.append((time.perf_counter(), n))

        yield Progress()

    def rates(self, name):
        """A second from the beginning of the stage on, and between its first and its last batch."""
        times = self.stages[name]
        total = sum(n for _, n in times)
        (start, _), (first, n_first), *_, (last, _) = times
        return total / (last - start), (total - n_first) / max(last - first, 1e-9)


@contextmanager
def gpu_load(on):
    """Percent of the time in which the driver saw a kernel running, sampled ten times a second; to be read after."""
    seen = []
    if not on:
        yield seen
        return
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
    process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    reader = threading.Thread(
        target=lambda: seen.extend((time.perf_counter(), int(line)) for line in process.stdout), daemon=True
    )
    reader.start()
    try:
        yield seen
    finally:
        process.terminate()
        reader.join(5)


def simple_loop(folder, paths, texts, device, size):
    """One process, float32: what a first script would do. Vectors and seconds of pictures and of texts."""
    import torch
    from transformers import AutoModel, AutoTokenizer, SiglipImageProcessorPil

    torch.set_float32_matmul_precision("highest")
    model = AutoModel.from_pretrained(folder).to(device).eval()
    tokenizer, processor = AutoTokenizer.from_pretrained(folder), SiglipImageProcessorPil.from_pretrained(folder)

    def encode(items, prepare, call):
        vectors, start = [], 0.0
        for number in range(-(-len(items) // size)):
            if number == 1:  # the first batch warms up
                start = time.perf_counter()
            inputs = {
                key: value.to(device) for key, value in prepare(items[number * size : (number + 1) * size]).items()
            }
            with torch.no_grad():
                output = call(**inputs)
            vectors.append(getattr(output, "pooler_output", output).cpu().numpy())
        return np.concatenate(vectors), (len(items) - size) / (time.perf_counter() - start)

    def pictures(batch):
        return processor(images=[Image.open(path).convert("RGB") for path in batch], return_tensors="pt")

    def words(batch):
        # SigLIP was trained without a mask
        return {"input_ids": tokenizer(batch, padding="max_length", truncation=True, max_length=64,
                                       return_tensors="pt")["input_ids"]}  # fmt: skip

    image, image_rate = encode(paths, pictures, model.get_image_features)
    text, text_rate = encode(texts, words, model.get_text_features)
    del model
    return image, image_rate, text, text_rate


def busy_share(events):
    """Share of the time between the first and the last kernel in which one ran."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel")
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (end - spans[0][0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--pictures", type=int, default=20_000, help="how many of the items have one")
    parser.add_argument("--loop-items", type=int, default=1_500, help="of these, by the simple loop")
    parser.add_argument("--side", type=int, default=500, help="pixels, about")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", default="bf16:spawn,tf32:spawn,fp32:spawn", help="precision:start of the processes")
    parser.add_argument("--workers", default="auto")
    parser.add_argument("--profile", type=int, default=0, help="items of a last run under the torch profiler")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further run is begun")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    began = time.perf_counter()

    import pyarrow.parquet as pq
    import torch

    from mmm4rec_cli.features.encoders import torch_device
    from mmm4rec_cli.features.extract import encode_catalogue
    from mmm4rec_cli.features.store import scattered
    from mmm4rec_cli.settings.schema import FeatureSettings

    device = torch_device(args.device)
    gpu = device.type == "cuda"
    root = Path(tempfile.mkdtemp())
    results = []

    def result(**entry):
        results.append(entry | {"machine": torch.cuda.get_device_name() if gpu else "cpu", "cores": os.cpu_count(),
                                "torch": torch.__version__})  # fmt: skip
        print(json.dumps(results[-1]), flush=True)

    pictures = root / "pictures"
    pictures.mkdir()
    spans = [range(first, min(args.pictures, first + 100)) for first in range(0, args.pictures, 100)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, [(pictures, span, args.side) for span in spans]))
    paths = [pictures / f"{number}.jpg" for number in range(min(args.items, args.pictures))]
    texts = sentences(args.items)
    model = root / "siglip"
    build(model, args.tiny)
    size = sum(path.stat().st_size for path in paths) / len(paths)
    print(f"{len(paths)} pictures of {size / 1000:.0f} kB drawn after {time.perf_counter() - began:.0f} s", flush=True)

    loop = simple_loop(str(model), paths[: args.loop_items], texts[: args.loop_items], device, 64)
    image_loop, image_rate, text_loop, text_rate = loop
    result(run="simple loop, fp32", items=args.loop_items, images_per_s=image_rate, texts_per_s=text_rate)

    def run(precision, start_method, items):
        multiprocessing.set_start_method(start_method, force=True)
        settings = FeatureSettings(encoder=str(model), precision=precision, workers=args.workers)
        watch, target = Watch(), root / f"{precision}.parquet"
        start = time.perf_counter()
        with gpu_load(gpu) as load:
            ids = [str(number) for number in range(items)]
            images = [*paths[:items], *[None] * (items - len(paths))]
            encode_catalogue(target, ids, texts[:items], images, settings, args.device, watch)
        seconds = time.perf_counter() - start
        entry = {
            "run": f"mmm4rec, {precision}, {start_method}",
            "items": items,
            "pictures": min(items, len(paths)),
            "seconds_in_all": seconds,
        }
        for what in ("images", "texts"):
            entry[f"{what}_per_s"], entry[f"{what}_per_s_after_first_batch"] = watch.rates(what)
        entry["images_over_loop"] = entry["images_per_s"] / image_rate
        entry["texts_over_loop"] = entry["texts_per_s"] / text_rate
        (_, _), (first, _), *_, (last, _) = watch.stages["images"]
        during = [percent for when, percent in load if first <= when <= last]
        entry["gpu_percent_images_nvidia_smi"] = float(np.mean(during)) if during else None
        table = pq.read_table(target)
        for what, reference in (("image", image_loop), ("text", text_loop)):
            vectors, _ = scattered(table[what].slice(0, min(items, args.loop_items)).combine_chunks())
            unit = reference[: len(vectors)] / np.linalg.norm(reference[: len(vectors)], axis=1, keepdims=True)
            entry[f"{what}_least_cosine_to_loop"] = float((vectors * unit).sum(1).min())
        if watch.said:
            print(*watch.said, sep="\n", flush=True)
        target.unlink()
        return entry

    for spec in args.runs.split(","):
        if time.perf_counter() - began > args.budget:
            print(f"no time left for {spec}", flush=True)
            continue
        result(**run(*spec.split(":"), args.items))
    if args.profile and gpu and time.perf_counter() - began < args.budget:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            entry = run("bf16", "fork", args.profile)
        profiler.export_chrome_trace(str(root / "trace.json"))
        events = json.loads((root / "trace.json").read_text())["traceEvents"]
        result(**entry | {"run": "mmm4rec, bf16, fork, under the profiler"}, kernels_busy_share=busy_share(events))
    if args.out:
        args.out.write_text("".join(json.dumps(one) + "\n" for one in results))
    shutil.rmtree(root)


if __name__ == "__main__":
    sys.exit(main())
