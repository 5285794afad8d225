"""Every baseline: what it learns, what it may not see, its sizes, its checkpoint, its published bugs."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch.utils._python_dispatch import TorchDispatchMode

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.models.baselines.medoids import k_medoids, whitened
from mmm4rec_cli.models.baselines.streams import contrast, random_places
from mmm4rec_cli.models.baselines.wavelet import transform
from mmm4rec_cli.models.registry import MODELS, build_model
from mmm4rec_cli.settings import load as load_settings
from mmm4rec_cli.settings import presets
from mmm4rec_cli.settings.presets import merged
from mmm4rec_cli.settings.schema import Settings

NAMES = sorted(MODELS.keys() - {"mmm4rec"})
V, T, F = 13, 6, 9
TINY = {"hidden_size": 16, "inner_size": 24, "d_state": 4, "head_dim": 8, "n_groups": 1, "max_len": T}
STILL = dict.fromkeys(("dropout", "embedding_dropout", "time_dropout"), 0.0)
FEW = {"experts": 3, "experts_used": 2, "clusters": 3, "attention_dropout": 0.0}


def features(seed=0):
    generator = torch.Generator().manual_seed(seed)
    text, image = (torch.randn(V, F, generator=generator) for _ in range(2))
    text[0] = image[0] = 0
    categories = [["a", "b"], None, ["c", "d", "c"], *([name] for name in "abcdabcda")]
    return ModelFeatures(text, image, None, None, categories)


def settings(name, protocol="corrected", **model):
    over = {"protocol": protocol, "model": {**TINY, **STILL, **model, "baseline": {**FEW, **model.get("baseline", {})}}}
    return Settings.model_validate(merged(presets.MODELS[name], over))


def build(name, protocol="corrected", **model):
    torch.manual_seed(3)
    return build_model(name, settings(name, protocol, **model).model, features())


def batch(users=8, seed=1):
    """Histories whose target follows from the last item."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(users) % T + 1
    items = torch.randint(1, V, (users, T), generator=generator)
    times = 1_500_000_000 + (torch.rand(users, T, generator=generator) * 90_000).long().cumsum(1)
    pad = torch.arange(T) >= lengths[:, None]
    last = torch.arange(users) % (V - 1) + 1
    items[torch.arange(users), lengths - 1] = last
    target = last % (V - 1) + 1
    return Windows(items.masked_fill(pad, 0), lengths, times.masked_fill(pad, 0), target)


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_set_is_learned_by_heart(name):
    model, windows = build(name), batch()
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        for _ in range(10):
            optimizer.zero_grad()
            model.training_loss(windows).backward()
            optimizer.step()
        with torch.no_grad():
            scores = model.eval().scores(model.users(windows))[:, 1:]
        model.train()
        if torch.equal(scores.argmax(1) + 1, windows.target_B):
            return
    pytest.fail("the targets are not on top")


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_behind_the_history_changes_nothing(name):
    model, windows = build(name).eval(), batch()
    pad = torch.arange(T) >= windows.lengths_B[:, None]
    items, times = windows.items_BT.masked_fill(pad, 7), windows.timestamps_BT.masked_fill(pad, 1_900_000_000)
    with torch.no_grad():
        one, other = model.users(windows), model(items, windows.lengths_B, times)
        assert torch.equal(one, other)
        changed = windows.items_BT.clone()
        changed[:, 0] = changed[:, 0] % (V - 1) + 1
        assert not torch.allclose(one, model(changed, windows.lengths_B, windows.timestamps_BT)), "items are read"


CAUSAL_STATES = [name for name in NAMES if name not in ("bsarec", "athwe")]


@pytest.mark.parametrize("name", CAUSAL_STATES)
def test_a_state_depends_on_its_past_alone(name):
    """With a later end of the same history the states before it stay: a shorter history has the same user vector."""
    model, windows = build(name).eval(), batch()
    full, length = torch.full((8,), T), torch.full((8,), 3)
    items = torch.randint(1, V, (8, T), generator=torch.Generator().manual_seed(5))
    times = 1_500_000_000 + 50_000 * torch.arange(T).expand(8, -1)
    cut = torch.arange(T) >= 3
    with torch.no_grad():
        short = model(items.masked_fill(cut, 0), length, times.masked_fill(cut, 0))
        assert torch.equal(short, model(items, length, times))
        assert not torch.allclose(short, model(items, full, times))
    assert windows.lengths_B.max() == T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", ["corrected", "published"])
def test_a_checkpoint_gives_the_same_numbers_bit_for_bit(name, protocol):
    runs = {"model.baseline.empty_categories": False} if protocol == "published" else {}
    model = build(name, protocol, baseline={"empty_categories": False} if runs else {}).eval()
    stored = save({k: v.contiguous() for k, v in model.state_dict().items()})
    torch.manual_seed(99)
    config = settings(name, protocol, baseline={"empty_categories": False} if runs else {}).model
    other = build_model(name, config, features()).eval()
    other.load_state_dict(load(stored))
    windows = batch()
    with torch.no_grad():
        assert torch.equal(model.scores(model.users(windows)), other.scores(other.users(windows)))


# M3Rec's blocks stop the gradient of text and image; the time stream ends with the last layer.
NOT_TRAINED = {
    "m3rec": ("text_stream.", "image_stream."),
    **dict.fromkeys(("tim4rec", "tim4rec-t"), ("layers.1.ssd.time_gate.", "layers.1.ssd.time_norm.")),
}


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host must know before it goes on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        booleans = name == "aten::index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not booleans, "indexing by booleans"
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_trained_and_nothing_waits_for_a_number(name):
    """What waits for a number cannot be recorded as a CUDA graph."""
    model, windows = build(name).train(), batch()
    with NoWaiting():
        loss = model.training_loss(windows)
    loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None}
    assert not [n for n in idle if not any(part in n for part in NOT_TRAINED.get(name, ()))]


def test_the_check_for_waiting_sees_it():
    with NoWaiting(), pytest.raises(AssertionError, match="local_scalar"):
        torch.ones(1).item()


def transformer(d, inner, layers):
    return layers * (4 * (d * d + d) + 2 * d + 2 * d * inner + inner + d + 2 * d)


def mamba_layer(d, n):
    e, r = 2 * d, -(-d // 16)
    return d * 2 * e + e * 5 + e * (r + 2 * n) + (r * e + e) + e * n + e + e * d + 2 * d


def feed_forward(d, inner):
    return 2 * d * inner + inner + d + 2 * d


def time_layer(d, n, heads, groups, t):
    e, s = 2 * d, groups * n
    block = 3 * heads + d * (2 * e + 2 * s + heads) + (2 * e + 2 * s + heads) + 5 * (e + 2 * s) + e + e * d + d
    return block + 2 * (heads * 5) + 2 * (t * t + t) + (t * t + t) + 2 * t + 2 * d + feed_forward(d, 256)


SIZES = {  # at the published sizes, with tables of V rows and texts and images of F
    "gru4rec": V * 64 + 3 * 128 * (64 + 128) + 3 * 128 * 256 + 128 * 64 + 64,
    "sasrec": V * 64 + 5 * 64 + 128 + transformer(64, 256, 2),
    "sasrec-t": F * 256 + 256 + 50 * 256 + 512 + transformer(256, 1024, 2),
    "bsarec": V * 64 + 50 * 64 + 128 + transformer(64, 256, 2) + 2 * 3 * 64,
    "mamba4rec": V * 64 + 128 + 2 * (mamba_layer(64, 32) + feed_forward(64, 256)),
    "mamba4rec-t": F * 64 + 64 + 128 + 2 * (mamba_layer(64, 32) + feed_forward(64, 256)),
    "tim4rec": V * 64 + 128 + 40 + 2 * time_layer(64, 32, 4, 4, 20),
    "tim4rec-t": F * 64 + 64 + 128 + 40 + 2 * time_layer(64, 32, 4, 1, 20),
    "m3rec": V * 256 + 2 * (F * 256 + 256 + 256 * 257) + 2 + 3 * 512 + 2 * mamba_layer(256, 32)
    + 6 * feed_forward(256, 1024),
    "hm4sr": V * 256 + 2 * (F * 256 + 256) + 50 * 256
    + 4 * (768 * 769) + 3 * (256 * 4 + 4) + 3
    + 3001 * 256 + 512 + (512 * 4 + 4) + 4 * 768
    + (512 * 256 + 256) + 3 * (512 + transformer(256, 1024, 2)) + (768 * 4 + 4),
    "athwe": V * 256 + 2 * (F * 256 + 256) + 50 * 256
    + 45 * 256 * 256 + 3
    + 210 * 256 + 9 * 768 + (256 * 768 + 768) + (768 * 8 + 8)
    + 256 * 257 + 3 + 3 * (512 + transformer(256, 1024, 2)) + (768 * 4 + 4) + 2 * (256 * 100 + 100),
    "unisrec": V * 300 + 8 * (F + F * 300) + 2 * 8 * F + 50 * 300 + 600 + transformer(300, 256, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_published_sizes_give_the_published_number_of_parameters(name):
    config = Settings.model_validate(presets.MODELS[name]).model
    model = build_model(name, config, features())
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]


def test_features_are_overwritten_under_the_published_protocol_only():
    given = features()
    assert torch.equal(build("m3rec").text.features, given.text)
    noise = build("m3rec", "published").text.features
    assert not torch.allclose(noise, given.text)
    assert 0.01 < noise.std() < 0.03


@pytest.mark.parametrize("name", ["hm4sr", "athwe"])
def test_what_does_not_run_as_published_says_so(name):
    with pytest.raises(UsageError, match="Q24"):
        build(name, "published")


def test_published_mamba_starts_with_other_step_sizes():
    def steps(protocol):
        block = build("mamba4rec", protocol).layers[0][0].mamba
        return torch.nn.functional.softplus(block.dt_proj.bias)

    assert steps("corrected").max() < 0.11
    assert torch.allclose(steps("published"), torch.tensor(0.6931), atol=1e-3)


def test_the_published_filter_reads_padding():
    model, windows = build("bsarec", "published").eval(), batch()
    pad = torch.arange(T) >= windows.lengths_B[:, None]
    with torch.no_grad():
        one = model.users(windows)
        other = model(windows.items_BT.masked_fill(pad, 7), windows.lengths_B, windows.timestamps_BT)
    assert not torch.allclose(one, other)


def test_masking_masks_and_the_published_one_does_not(monkeypatch):
    from mmm4rec_cli.models.baselines import athwe

    counts = []
    monkeypatch.setattr(athwe, "random_places", lambda real, count: counts.append(count) or random_places(real, count))
    windows = batch()
    build("athwe").train().training_loss(windows)
    build("athwe", baseline={"mask_nothing": True}).train().training_loss(windows)
    assert counts[0].min() == 1
    assert counts[1].max() == 0


def test_random_places_are_real_and_as_many_as_asked():
    real = torch.arange(T) < torch.tensor([[1], [4], [6]])
    count = torch.tensor([0, 2, 5])
    drawn = random_places(real, count)
    assert torch.equal(drawn.sum(1), count)
    assert not (drawn & ~real).any()


def test_the_contrast_by_hand():
    query = key = torch.eye(3)
    labels = torch.tensor([4, 4, 5])
    hidden = float(contrast(query, key, labels, 1.0, mask_duplicates=True))
    counted = float(contrast(query, key, labels, 1.0, mask_duplicates=False))
    e = np.e
    assert hidden == pytest.approx((2 * np.log((e + 1) / e) + np.log((e + 2) / e)) / 3)
    assert counted == pytest.approx(np.log((e + 2) / e))


@pytest.mark.parametrize("length", [6, 15, 50])
def test_the_wavelet_transform_comes_back_and_kills_cubics(length):
    matrices = transform(length, 4)
    x = torch.randn(length, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    assert torch.allclose(sum(m.T @ (m @ x) for m in matrices), x, atol=1e-10)
    if length == 50:
        assert [len(m) for m in matrices] == [9, 9, 12, 17, 28]
        inside = matrices[-1][4:-4] @ torch.linspace(-1, 1, length, dtype=torch.float64) ** 3
        assert inside.abs().max() < 1e-10


def test_medoids_find_separate_groups_and_are_the_same_again():
    random = np.random.default_rng(0)
    centres = np.repeat(np.arange(4.0)[:, None] * 50, 6, 1)
    rows = np.concatenate([c + random.normal(size=(10, 6)) for c in centres])
    labels = k_medoids(rows, 4, np.random.default_rng(5))
    assert len({tuple(sorted(set(labels[i : i + 10]))) for i in range(0, 40, 10)}) == 4
    assert np.array_equal(labels, k_medoids(rows, 4, np.random.default_rng(5)))
    assert set(k_medoids(np.zeros((5, 2)), 3, random)) == {0}
    white = whitened(random.normal(size=(500, 3)) @ np.diag([1, 5, 9]))
    assert np.allclose(white.T @ white / 500, np.eye(3), atol=1e-6)


def test_categories_are_counted_by_name():
    counts = features().category_counts()
    assert counts.shape == (V, 4)
    assert counts[:4].tolist() == [[0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 2, 1]]
    given = features()
    assert ModelFeatures(given.text, given.image, None, None).category_counts() is None


def test_presets_lie_below_the_domains_and_what_is_given():
    chosen = load_settings(model="bsarec")
    assert (chosen.finetune.optimizer, chosen.finetune.shuffle, chosen.finetune.metric) == ("adam", False, "Hit@10")
    chosen = load_settings(model="bsarec", domain="office", overrides=["finetune.lr=0.5"])
    assert (chosen.finetune.metric, chosen.finetune.lr, chosen.model.hidden_size) == ("NDCG@10", 0.5, 64)
    assert presets.MODELS.keys() == set(NAMES)
