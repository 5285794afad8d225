"""Properties of MMM4Rec beyond the golden numbers."""

import pytest
import torch

from mmm4rec_cli.device import precision
from mmm4rec_cli.models.mmm4rec import MMM4Rec, ModalityInput
from mmm4rec_cli.models.places import Places
from mmm4rec_cli.models.time_stream import GapBuckets, ObservedGaps
from mmm4rec_cli.settings import Settings

V, T = 30, 8
SMALL = {
    **{"hidden_size": 16, "inner_size": 24, "d_state": 4, "head_dim": 4, "n_groups": 8, "max_len": T, "num_layers": 2},
    **{"dropout": 0.0, "embedding_dropout": 0.0, "time_dropout": 0.0, "time": "observed"},
}


def build(protocol="corrected", seed=0, **model):
    config = Settings.model_validate({"protocol": protocol, "model": {**SMALL, **model}}).model
    torch.manual_seed(seed)
    features = torch.randn(V, 12), torch.randn(V, 9)
    for table in features:
        table[0] = 0
    net = MMM4Rec(config, *features)
    with torch.no_grad():  # away from the start, where much is near zero
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.double().eval()


def histories(batch=6):
    generator = torch.Generator().manual_seed(1)
    items = torch.randint(1, V, (batch, T), generator=generator)
    lengths = torch.tensor([1, 2, 3, 5, T, T])[:batch]
    gaps = torch.randint(0, 40, (batch, T), generator=generator) * 3600
    times = 1_500_000_000 + gaps.cumsum(1)
    pad = torch.arange(T) >= lengths[:, None]
    return items.masked_fill(pad, 0), lengths, times.masked_fill(pad, 0)


@pytest.mark.parametrize("time", ["observed", "none", "buckets", "decay"])
def test_what_stands_in_padded_places_changes_nothing(time):
    model = build(time=time)
    items, lengths, times = histories()
    pad = torch.arange(T) >= lengths[:, None]
    other_items = torch.where(pad, 7, items)
    other_times = torch.where(pad, 1_800_000_000, times)
    with torch.no_grad():
        assert torch.equal(model(items, lengths, times), model(other_items, lengths, other_times))


def test_only_the_published_time_reads_the_stamp_behind_a_short_history():
    items, lengths, times = histories()
    peeked = times.clone()
    short = lengths < T
    peeked[short, lengths[short]] = times[short, lengths[short] - 1] + 90 * 86_400
    for time, reads in (("observed", False), ("published", True)):
        model = build(time=time)
        assert model.reads_target_time == reads
        with torch.no_grad():
            same = (model(items, lengths, times) == model(items, lengths, peeked)).all(1)
        assert same[~short].all()
        assert same[short].all() != reads


def test_a_permutation_of_users_permutes_the_output():
    model = build()
    items, lengths, times = histories()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        whole = model(items, lengths, times)
        torch.testing.assert_close(model(items[order], lengths[order], times[order]), whole[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("time", ["observed", "published", "buckets", "decay"])
def test_gaps_matter(time):
    model = build(time=time)
    items, lengths, times = histories()
    slower = times.clone()
    slower[:, 1:] += 30 * 86_400
    slower = slower.where(times != 0, 0)
    with torch.no_grad():
        moved = (model(items, lengths, times) - model(items, lengths, slower)).abs().amax(1)
    assert (moved[lengths > 1] > 1e-9).all()


@pytest.mark.parametrize("time", ["buckets", "decay"])
def test_gaps_enter_from_nothing(time):
    plain, other = build(time="none"), build(time=time)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name not in dict(plain.named_parameters()):
                parameter.zero_()
    assert not other.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        assert torch.equal(other(*histories()), plain(*histories()))


def test_a_positive_power_forgets_over_a_long_gap():
    block = build(time="decay").layers[0].ssd
    items = torch.randn(1, T, SMALL["hidden_size"], generator=torch.Generator().manual_seed(0)).double()
    other = items.clone()
    other[0, 0] += 1
    places = Places.padded(torch.tensor([T]), T)
    gaps = torch.zeros(T).double()
    gaps[T // 2] = 3.0

    def left(power):
        """How much of the first item is left at the last place behind the gap, over what is left without the gap."""
        with torch.no_grad():
            block.gap_power.fill_(power)
            moved = [block(a, None, places, g)[0][0, -1] for g in (gaps, 0 * gaps) for a in (items, other)]
        return ((moved[0] - moved[1]).norm() / (moved[2] - moved[3]).norm()).item()

    assert left(2.0) < 1e-3
    assert left(0.0) == 1


def test_ranges_of_gaps_are_half_a_doubling_wide():
    table = GapBuckets(1)
    with torch.no_grad():
        table.weight.copy_(torch.arange(64.0)[:, None])
    gaps = torch.tensor([0, 1, 3, 7, 2**40])
    times = torch.cat([torch.zeros(1, dtype=torch.int64), gaps.cumsum(0), torch.tensor([5])])[None]
    found = table(times, torch.tensor([6]))[0, :, 0].tolist()
    assert found == [0, 1, 3, 5, 7, 63, 0]


def test_scaled_features_are_the_plain_model_on_scaled_vectors():
    torch.manual_seed(1)
    text, image = 5 + 3 * torch.randn(V, 12), 40 * torch.randn(V, 9)
    text[0] = image[0] = 0
    image[4] = 0  # without an image
    for table, rows in ((text, [*range(1, V)]), (image, [i for i in range(1, V) if i != 4])):
        by_hand = (table - table[rows].mean(0)) / table[rows].std(0)
        units = torch.nn.functional.normalize(table, dim=-1)
        for scale, expected in (("standard", by_hand), ("unit", units)):
            config = Settings.model_validate({"model": {**SMALL, "feature_scale": scale}}).model
            ours = ModalityInput(config, table, None)
            plain = ModalityInput(Settings.model_validate({"model": SMALL}).model, expected, None)
            plain.load_state_dict(ours.state_dict(), strict=False)
            with torch.no_grad():
                torch.testing.assert_close(ours.vectors(), plain.vectors(), rtol=1e-4, atol=1e-4)
            some = torch.tensor([3, 7])
            torch.testing.assert_close(ours.vectors(some), ours.vectors()[some])
    assert {"shift", "scale"} <= ModalityInput(
        Settings.model_validate({"model": {**SMALL, "feature_scale": "standard"}}).model, text, None
    ).state_dict().keys()


def test_one_huge_gap_does_not_erase_the_others():
    stream = ObservedGaps(T, 0.0).double()
    day = 86_400
    calm = torch.tensor([[0, day, 2 * day, 9 * day, 10 * day, 11 * day, 0, 0]]) + 10**9
    huge = calm.clone()
    huge[:, 3:] += 3_000 * day
    lengths = torch.tensor([6])
    u, v = stream.gaps(calm, lengths), stream.gaps(huge, lengths)
    same = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(u[:, same], v[:, same])
    assert u.abs().max() < 3
    assert v.abs().max() < 4
    assert (u[0, 1] - u[0, 3]).abs() > 0.3


def test_the_corrected_protocol_leaves_padding_and_duplicates_out():
    corrected, published = build(), build(protocol="published")
    published.load_state_dict(corrected.state_dict())
    user = torch.randn(4, 16, dtype=torch.float64)
    target = torch.tensor([3, 5, 3, 9])
    scores = corrected.scores(user)
    expected = torch.nn.functional.cross_entropy(scores, target)
    assert torch.allclose(published.loss(user, target), expected)
    without = scores.clone()
    without[:, 0] = float("-inf")
    assert torch.allclose(corrected.loss(user, target), torch.nn.functional.cross_entropy(without, target))
    own = scores[:, target]
    assert torch.allclose(published.loss(user, target, in_batch=True), -own.log_softmax(1).diagonal().mean())
    own[0, 2] = own[2, 0] = float("-inf")
    assert torch.allclose(corrected.loss(user, target, in_batch=True), -own.log_softmax(1).diagonal().mean())


@pytest.mark.parametrize("fusion", ["static", "shared", "instance"])
def test_scores_are_the_weighted_sum_of_both_modalities(fusion):
    model = build(fusion=fusion)
    user = torch.randn(3, 16, dtype=torch.float64)
    text, image = model.normalised_items()
    by_text, by_image = user @ text.T, user @ image.T
    if fusion == "static":
        expected = by_text + by_image
    else:
        weight = model.fusion_weight.softmax(-1)
        expected = by_text * weight[..., 0] + by_image * weight[..., 1]
    assert torch.allclose(model.scores(user), expected / 0.8, atol=1e-12)
    rows = torch.tensor([4, 9])
    assert torch.allclose(model.item_table(rows), model.item_table()[rows], atol=1e-12)


def test_a_learned_vector_stands_for_missing_ones_and_starts_at_the_mean():
    config = Settings.model_validate({"model": SMALL}).model
    text, image = torch.randn(V, 12), torch.randn(V, 9)
    missing = torch.zeros(V, dtype=torch.bool)
    missing[[2, 5]] = True
    text[0] = image[0] = 0
    image[missing] = 0
    model = MMM4Rec(config, text, image, image_missing=missing)
    present = ~missing
    present[0] = False
    assert torch.allclose(model.image.missing, image[present].mean(0), atol=1e-6)
    vectors = model.image.vectors()
    assert torch.equal(vectors[2], vectors[5])
    vectors[2].sum().backward()
    assert model.image.missing.grad.abs().sum() > 0
    assert not hasattr(model.text, "missing")


def test_state_dict_names_are_kept():
    names = set(build(num_layers=1, fusion="shared").state_dict())
    assert names == {
        *(f"{m}.{p}" for m in ("text", "image") for p in ("item_bias", "adapter.weight", "adapter.bias")),
        *(f"{m}.norm.{p}" for m in ("text", "image") for p in ("weight", "bias")),
        *("gaps.weight", "gaps.bias", "fusion_weight"),
        *(f"layers.0.{b}.{p}" for b in ("ssd", "cross_ssd") for p in ("A_log", "D", "dt_bias", "norm.weight")),
        *(
            f"layers.0.{part}.{p}"
            for part in (
                *("ssd.in_proj", "ssd.out_proj", "ssd.conv", "ssd.time_gate", "ssd.time_norm"),
                *(f"{b}.time.{q}" for b in ("ssd", "cross_ssd") for q in ("mlp_in", "mlp_out", "conv_in", "conv_out")),
                *(f"cross_ssd.{q}" for q in ("u_in_proj", "z_in_proj", "q_in_proj", "u_conv", "q_conv", "out_proj")),
                *(f"filter.{m}.{q}" for m in ("image", "text", "joint") for q in ("real", "imag")),
                *("text_norm", "image_norm", "cross_norm"),
                *(f"{m}_ffn.{q}" for m in ("text", "image") for q in ("fc1", "fc2", "norm")),
            )
            for p in ("weight", "bias")
        ),
    }


@pytest.mark.parametrize(("layers", "published_size"), [(1, 1_999_085), (2, 3_603_378)])
def test_the_paper_sizes_have_the_published_number_of_parameters(layers, published_size):
    config = Settings.model_validate({"model": {"num_layers": layers, "item_bias": False, "time": "published"}}).model
    model = MMM4Rec(config, torch.zeros(5, 768), torch.zeros(5, 768))
    assert sum(p.numel() for p in model.parameters()) == published_size


def test_start_values_are_the_published_ones():
    config = Settings.model_validate({"model": {"item_bias": True, "time": "published"}}).model
    torch.manual_seed(3)
    model = MMM4Rec(config, torch.randn(50, 768), torch.randn(50, 768))
    block = model.layers[0].ssd
    step = torch.nn.functional.softplus(block.dt_bias)
    assert ((step >= 9e-4) & (step <= 0.11)).all()
    assert ((block.A_log.exp() >= 1) & (block.A_log.exp() <= 16)).all()
    assert (block.D == 1).all()
    assert block.conv.weight.abs().max() <= 0.5
    assert block.conv.weight.abs().max() > 0.45
    assert block.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not block.in_proj.bias.any()
    assert not model.text.item_bias.any()


def test_a_history_of_another_length_is_refused():
    model = build()
    items, lengths, times = histories()
    with pytest.raises(ValueError, match="max_len"):
        model(items[:, :5], lengths.clamp(max=5), times[:, :5])


@pytest.mark.parametrize("time", ["observed", "published", "none"])
def test_bfloat16_products_give_about_the_same_users(time):
    net = build(time=time).float()
    with torch.no_grad():
        want = net(*histories())
        with precision("bf16", torch.device("cpu")):
            got = net(*histories())
    assert float((got - want).norm() / want.norm()) < 0.05
