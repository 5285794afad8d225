"""The model against the published implementation's own numbers (float64, and float32 within its deviation)."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models import blocks, mmm4rec
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.models.published import published_name
from mmm4rec_cli.settings import Settings
from mmm4rec_kernels.block import composed

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
VARIANTS = ["", "_layers1", "_notime", "_dynshared", "_nobias", "_p2p"]
FUSION = {"static": "static", "dynamic_shared": "shared", "dynamic_instance": "instance"}


class Golden:
    def __init__(self, variant: str) -> None:
        base = load_file(GOLDEN / "golden_small.safetensors")
        self.meta = json.loads((GOLDEN / f"golden_small{variant}.json").read_text())
        self.tensors = {k: v for k, v in base.items() if k.startswith("param/")}
        self.tensors |= load_file(GOLDEN / f"golden_small{variant}.safetensors")
        config = self.meta["config"]
        time = "published" if config["is_time"] else "none"
        names = ["hidden_size", "inner_size", "num_layers", "d_state", "n_groups", "d_conv", "expand", "head_dim"]
        section = {name: config[name] for name in [*names, "max_len", "temperature"]}
        section |= {
            "norm_eps": float(config["norm_eps"]),
            "feed_forward": config["is_ffn"],
            "point_time_gate": config["p2p_residual"],
            "item_bias": config["is_modality_bias"],
            "fusion": FUSION[config["item_mm_fusion"]],
            "time": time,
            **dict.fromkeys(["dropout", "embedding_dropout", "time_dropout"], 0.0),
        }
        self.config = Settings.model_validate({"protocol": "published", "model": section}).model

    def model(self, dtype: torch.dtype) -> MMM4Rec:
        features = [self.tensors[f"param/{name}"].to(dtype) for name in ("text_embedding", "vision_embedding")]
        model = MMM4Rec(self.config, *features).to(dtype)
        report = model.load_published({k[6:]: v for k, v in self.tensors.items() if k.startswith("param/")})
        assert report.missing == ()
        allowed = () if self.meta["name"] == "golden_small" else ("layers.1.", "time", "complex", "bias", "fusion")
        assert all(any(part in key for part in allowed) for key in report.unexpected)
        return model

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tensors["in/item_seq"], self.tensors["in/item_seq_len"], self.tensors["in/time_stamps"]


@pytest.fixture(params=VARIANTS, ids=lambda v: v.strip("_") or "base")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def deviation(got: Tensor, want: Tensor) -> float:
    """The larger of ‖Δ‖/‖want‖ and max|Δ|/max|want|."""
    want = want.double()
    delta = got.detach().double().view_as(want) - want
    return max(float(delta.norm() / want.norm()), float(delta.abs().max() / want.abs().max()))


def recorded(model: MMM4Rec, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model once and gather the intermediates under the golden files' keys."""
    calls: dict[str, list] = defaultdict(list)

    def keep(name: str):
        return lambda module, inputs, output: calls[name].append(output)

    for name in ("text", "image"):
        part = getattr(model, name)
        part.adapter.register_forward_hook(keep(f"{name}.adapter"))
        part.register_forward_hook(keep(f"{name}.in"))
    if model.gaps is not None:
        model.gaps.register_forward_pre_hook(lambda module, inputs: calls["gaps.raw"].append(inputs[0]))
        model.gaps.register_forward_hook(keep("gaps.ln"))
    for i, layer in enumerate(model.layers):
        for part in ("ssd", "cross_ssd", "cross_norm", "text_ffn", "image_ffn", "filter"):
            module = getattr(layer, part)
            if module is not None:
                module.register_forward_hook(keep(f"{i}.{part}"))
        # The norms of both modalities are one operation: what they give is what the next module is given.
        for part in ("text_ffn", "cross_ssd"):
            module = getattr(layer, part)
            module.register_forward_pre_hook(lambda m, inputs, name=f"{i}.{part}.given": calls[name].append(inputs[0]))
    scan = composed.ssd

    def recording_scan(x, dt, *args, **kwargs):
        y = scan(x, dt, *args, **kwargs)
        calls["scan"].append((dt, y))
        return y

    monkeypatch.setattr(composed, "ssd", recording_scan)
    user = model(*golden.inputs())

    mid: dict[str, Tensor] = {}
    for ours, theirs in (("image", "vision"), ("text", "text")):
        mid[f"{theirs}_adapter_seq"] = calls[f"{ours}.adapter"][0]
        mid[f"{theirs}_emb_sum"] = getattr(model, ours).vectors(golden.inputs()[0])
        mid[f"{theirs}_in"] = calls[f"{ours}.in"][0]
    if model.gaps is not None:
        mid["time_diff_raw"], mid["time_diff_ln"] = calls["gaps.raw"][0], calls["gaps.ln"][0]
    scans = iter(calls["scan"])
    for i in range(len(model.layers)):
        # The two modalities go through the shared block together: image first, text last.
        out, stream = calls[f"{i}.ssd"][0]
        (dt, y), (mid[f"L{i}.dec.co_ssd.kernel.dt"], mid[f"L{i}.dec.co_ssd.kernel.y"]) = next(scans), next(scans)
        for block, part in (("dec", 0), ("enc", -1)):
            mid[f"L{i}.{block}.ssd.kernel.dt"], mid[f"L{i}.{block}.ssd.kernel.y"] = dt.chunk(2)[part], y.chunk(2)[part]
            mid[f"L{i}.{block}.ssd_out"] = out[part]
            mid[f"L{i}.{block}.ssd_time_out"] = mid[f"L{i}.{block}oder_time_out"] = (
                None if stream is None else stream[part]
            )
        mid[f"L{i}.enc.after_ssd_norm"] = calls[f"{i}.text_ffn.given"][0]
        mid[f"L{i}.encoder_out"] = calls[f"{i}.text_ffn"][0]
        mid[f"L{i}.dec.after_ssd_norm"] = calls[f"{i}.cross_ssd.given"][0]
        mid[f"L{i}.dec.co_time"] = calls[f"{i}.filter"][0] if calls[f"{i}.filter"] else None
        mid[f"L{i}.dec.co_ssd_out"] = calls[f"{i}.cross_ssd"][0]
        mid[f"L{i}.dec.after_co_norm"] = calls[f"{i}.cross_norm"][0]
        mid[f"L{i}.decoder_out"] = calls[f"{i}.image_ffn"][0]
    return user, mid


def outputs(model: MMM4Rec, golden: Golden, user: Tensor) -> dict[str, Tensor]:
    labels = golden.tensors["in/labels"]
    text, image = model.normalised_items()
    return {
        "seq_output": user,
        "scores": model.scores(user),
        "text_item_normed": text,
        "vision_item_normed": image,
        "loss_full": model.loss(user, labels),
        "scores_inbatch": user @ model.item_table(labels).T,
        "loss_inbatch": model.loss(user, labels, in_batch=True),
    }


def packed_users(model: MMM4Rec, golden: Golden, spare: int = 0) -> Tensor:
    """User vectors computed on the real places alone, and `spare` more that nobody reads, as a GPU does it."""
    windows = given_windows(golden, spare)
    places = model._places(windows)
    assert places.offsets is not None
    return model._last(windows, places, *model._rows(places.ids(windows.items_BT)))


def read_users(model: MMM4Rec, golden: Golden, spare: int = 0) -> Tensor:
    """User vectors computed in parts, as a CPU does it."""
    return model.users(given_windows(golden, spare))


def given_windows(golden: Golden, spare: int) -> Windows:
    items, lengths, times = golden.inputs()
    return Windows(items, lengths, times, golden.tensors["in/labels"], rows=int(lengths.sum()) + spare)


def gradients(model: MMM4Rec, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    grads = {}
    for name, parameter in model.named_parameters():
        key = published_name(name)
        assert key is not None
        assert parameter.grad is not None, name
        grads[key] = parameter.grad.unsqueeze(1) if "conv1d" in key and parameter.dim() == 2 else parameter.grad
    return grads


def test_float64_outputs_and_intermediates_equal_the_published_ones(golden, monkeypatch):
    model = golden.model(torch.float64).eval()
    user, mid = recorded(model, golden, monkeypatch)
    got = {f"out/{k}": v for k, v in outputs(model, golden, user).items()} | {f"mid/{k}": v for k, v in mid.items()}
    wanted = {k: v for k, v in golden.tensors.items() if k.startswith(("out/", "mid/")) and v.is_floating_point()}
    assert wanted.keys() <= got.keys()
    assert max(deviation(got[key], want) for key, want in wanted.items()) < 1e-9
    ranks = (got["out/scores"] > got["out/scores"].gather(1, golden.tensors["in/labels"][:, None])).sum(1)
    assert torch.equal(ranks, golden.tensors["out/label_rank0"])


def chosen(path: str, monkeypatch: pytest.MonkeyPatch):
    """What computes user vectors: whole sequences packed, in parts, or packed with the tails that kernels give."""
    if path == "parts":
        return read_users
    monkeypatch.setattr(blocks, "TAILS_ON", ())
    if path != "packed":
        monkeypatch.setattr(blocks, "tail_unfit", lambda *sizes: "")
        monkeypatch.setattr(blocks, "TAILS_FROM", 0 if path == "packed tails" else 1000)
        monkeypatch.setattr(blocks, "_apart", lambda x: True)
    return packed_users


@pytest.mark.parametrize("spare", [0, 1, 13])
@pytest.mark.parametrize("path", ["packed", "packed tails", "packed cross tail", "parts"])
def test_without_what_nobody_reads_the_user_vectors_are_the_same(golden, spare, path, monkeypatch):
    monkeypatch.setattr(mmm4rec, "ROWS_A_PART", 15)
    monkeypatch.setattr(mmm4rec, "PADDING_A_PART", spare)
    users = chosen(path, monkeypatch)
    model = golden.model(torch.float64).eval()
    with torch.no_grad():
        assert deviation(users(model, golden, spare), golden.tensors["out/seq_output"]) < 1e-9


@pytest.mark.parametrize("path", ["padded", "packed", "packed tails", "packed cross tail", "parts"])
def test_float64_gradients_equal_the_published_ones(golden, path, monkeypatch):
    monkeypatch.setattr(mmm4rec, "ROWS_A_PART", 15)
    model = golden.model(torch.float64).eval()
    users = (lambda m, g, spare: m(*g.inputs())) if path == "padded" else chosen(path, monkeypatch)
    user = users(model, golden, spare=5)
    losses = outputs(model, golden, user)
    for kind, loss in (("grad/", losses["loss_full"]), ("grad_inbatch/", losses["loss_inbatch"])):
        wanted = {k.removeprefix(kind): v for k, v in golden.tensors.items() if k.startswith(kind)}
        if not wanted:
            continue
        got = gradients(model, loss)
        assert wanted.keys() <= got.keys()
        # The golden gradients are stored as float32.
        worst = {name: deviation(got[name], want) for name, want in wanted.items() if want.abs().max() > 0}
        assert max(worst.values()) < 1e-6, max(worst, key=worst.get)


def compiled_losses(model: MMM4Rec, golden: Golden, backend: str) -> dict[str, Tensor]:
    """User vectors and both losses from one graph of torch.compile."""

    def whole(items: Tensor, lengths: Tensor, times: Tensor, labels: Tensor) -> dict[str, Tensor]:
        user = model(items, lengths, times)
        losses = {f"loss_{kind}": model.loss(user, labels, in_batch=kind == "inbatch") for kind in ("full", "inbatch")}
        return {"seq_output": user, **losses}

    torch.compiler.reset()
    try:
        return torch.compile(whole, fullgraph=True, backend=backend)(*golden.inputs(), golden.tensors["in/labels"])
    finally:
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own tracer
@pytest.mark.parametrize("variant", ["", "_notime"])
def test_traced_by_torch_compile_outputs_and_gradients_equal_the_published_ones(variant):
    # Without inductor, which gives other gradients of gathered rows on a CPU (torch 2.13); `gpu` has it.
    golden = Golden(variant)
    model = golden.model(torch.float64).eval()
    got = compiled_losses(model, golden, "aot_eager_decomp_partition")
    assert max(deviation(value, golden.tensors[f"out/{name}"]) for name, value in got.items()) < 1e-9
    wanted = {k.removeprefix("grad/"): v for k, v in golden.tensors.items() if k.startswith("grad/") and v.any()}
    found = gradients(model, got["loss_full"])
    assert max(deviation(found[name], want) for name, want in wanted.items()) < 1e-6


def test_float32_stays_within_a_few_times_the_published_float32_deviation(golden):
    model = golden.model(torch.float32).eval()
    with torch.no_grad():
        got = outputs(model, golden, model(*golden.inputs()))
    allowed = golden.meta["float32_deviation_of_reference_from_its_own_float64_run"]
    for name, value in got.items():
        want = golden.tensors[f"out/{name}"]
        error = float((value.double() - want).abs().max())
        rounding = 2 * torch.finfo(torch.float32).eps * float(want.abs().max())  # a scalar can be luckily exact
        assert error <= 5 * allowed[name] + rounding, name


@pytest.mark.parametrize("wrong", ["skip", "crossed"])
def test_a_wrong_model_fails_the_golden_check(wrong, monkeypatch):
    golden = Golden("")
    if wrong == "skip":
        scan = composed.ssd
        monkeypatch.setattr(composed, "ssd", lambda *a, skip, **k: scan(*a, skip="x", **k))
    model = golden.model(torch.float64).eval()
    if wrong == "crossed":
        for layer in model.layers:
            layer.filter.image, layer.filter.joint = layer.filter.joint, layer.filter.image
    with torch.no_grad():
        user = model(*golden.inputs())
    assert deviation(user, golden.tensors["out/seq_output"]) > 1e-3


def test_published_names_round_trip_exactly(golden):
    model = golden.model(torch.float32)
    state = model.published_state()
    other = MMM4Rec(golden.config, torch.zeros_like(model.text.features), torch.zeros_like(model.image.features))
    report = other.load_published(state)
    assert report.missing == report.unexpected == ()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    for alias, name in golden.meta["aliases"].items():
        assert state[alias] is state[name]


def test_weights_of_another_width_are_refused_by_name():
    golden = Golden("")
    model = golden.model(torch.float32)
    state = model.published_state() | {"text_adapter.0.weight": torch.zeros(32, 99)}
    with pytest.raises(ValueError, match=r"text_adapter\.0\.weight.*\[32, 99\].*\[32, 24\]"):
        model.load_published(state)
