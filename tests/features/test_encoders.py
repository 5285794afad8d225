import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmm4rec_cli.errors import DataError, DeviceError, NetworkError, UsageError
from mmm4rec_cli.features.encoders import _looked_up, load_encoder
from mmm4rec_cli.features.store import PAIRS, PRESETS, fingerprint
from mmm4rec_cli.settings.schema import FeatureSettings

TEXTS = ["red cotton scarf", "a book about cats and dogs and a blue ceramic mug", "mouse"]
PICTURES = [Image.effect_noise((60, 40), 90).convert("RGB"), Image.new("RGB", (32, 90), "#c04010")]


@pytest.fixture
def load(reporter):
    def load_(**settings):
        return load_encoder(FeatureSettings(**settings), "cpu", reporter)

    return load_


def images(encoder, pictures):
    return encoder.image.images([encoder.image.prepare(one) for one in pictures])


def check_sides(encoder, text_width, image_width):
    texts, pictures = encoder.text.texts(TEXTS), images(encoder, PICTURES)
    assert texts.shape == (3, text_width)
    assert pictures.shape == (2, image_width)
    assert texts.dtype == pictures.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(pictures, axis=1), 1, rtol=1e-5)
    assert len(np.unique(texts.round(4), axis=0)) == 3
    for row, text in zip(texts, TEXTS, strict=True):
        np.testing.assert_allclose(encoder.text.texts([text])[0], row, atol=1e-6)
    for row, picture in zip(pictures, PICTURES, strict=True):
        np.testing.assert_allclose(images(encoder, [picture])[0], row, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "width"), [("siglip", 16), ("siglip2", 16), ("clip", 12), ("blip", 10), ("blip-joint", 12), ("blip2", 14)]
)
def test_a_joint_model_gives_unit_vectors_that_do_not_depend_on_the_batch(load, model, kind, width):
    check_sides(load(encoder=model(kind)), width, width)


SHORT = {
    "siglip": ("siglip", "siglip"),
    "siglip2": ("siglip", "siglip"),
    "clip": ("clip", "clip"),
    "blip": ("blip", "blip"),
    "blip2": ("blip2", "blip2"),
    "fashion-siglip": ("siglip", "siglip"),
    "siglip+roberta": ("roberta", "siglip"),
    "clip+bert": ("bert", "clip"),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_loads_the_hubs_copy_on_the_disk(load, model, tmp_path, monkeypatch, name):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ids = PAIRS[name] if name in PAIRS else (PRESETS[name], PRESETS[name])
    for one, kind in zip(ids, SHORT[name], strict=True):
        repository = tmp_path / f"models--{one.replace('/', '--')}"
        shutil.copytree(model(kind), repository / "snapshots" / "a", dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text("a")
    encoder = load(encoder=name)
    assert (encoder.name, encoder.models) == (name, {"text": ids[0], "image": ids[1]})
    widths = {"siglip": 16, "clip": 12, "blip": 10, "blip2": 14, "roberta": 16, "bert": 16}
    check_sides(encoder, *(widths[kind] for kind in SHORT[name]))


def test_every_short_name_is_tried():
    assert {*PRESETS, *PAIRS} == {*SHORT, "sketch"}


def test_blip_vectors_are_those_of_its_own_contrastive_score(load, model):
    """The model itself gives cosines of its unit vectors, so they tell whether ours are the same."""
    import torch
    import transformers

    for kind in ("blip", "blip2"):
        encoder = load(encoder=model(kind))
        own = getattr(transformers, encoder.identity["text"]["model"]).from_pretrained(model(kind)).eval()
        tokens = {key: torch.as_tensor(value) for key, value in encoder.text.preparer(TEXTS).items()}
        pixels = torch.from_numpy(np.stack([encoder.image.prepare(one)["pixel_values"] for one in PICTURES]))
        given = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        texts, pictures = encoder.text.texts(TEXTS), images(encoder, PICTURES)
        with torch.no_grad():
            if kind == "blip":
                score = own(pixel_values=pixels, **given, use_itm_head=False).itm_score.numpy()
                np.testing.assert_allclose(pictures @ texts.T, score, atol=1e-6)
            else:
                output = own(pixel_values=pixels, **given, use_image_text_matching_head=False)
                np.testing.assert_allclose(texts, output.text_embeds, atol=1e-6)
                mean = output.image_embeds.mean(1)
                np.testing.assert_allclose(pictures, mean / mean.norm(dim=1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("pooling", ["pooled", "mean"])
@pytest.mark.parametrize("seeing", ["vit", "vit-no-pooler", "resnet"])
def test_any_text_model_goes_with_any_image_model(load, model, pooling, seeing):
    encoder = load(text_model=model("bert"), image_model=model(seeing), text_pooling=pooling)
    assert encoder.models == {"text": model("bert"), "image": model(seeing)}
    assert encoder.name == f"bert-1+{seeing}-1"
    assert encoder.identity["text"]["pooling"] == pooling
    assert encoder.identity["image"]["pooling"] == ("mean" if seeing == "vit-no-pooler" else "pooled")
    check_sides(encoder, 16, 16)


def test_a_side_without_a_model_of_its_own_is_the_encoders(load, model, reporter):
    encoder = load(encoder=model("siglip"), text_model=model("bert"))
    assert (encoder.identity["text"]["model"], encoder.identity["image"]["model"]) == ("BertModel", "SiglipModel")
    check_sides(encoder, 16, 16)
    assert not reporter.warnings
    check_sides(load(encoder="sketch", image_model=model("vit")), 128, 16)
    assert any("not for research" in text for text in reporter.warnings)


def test_siglip_reads_sentencepiece_padded_to_the_end_and_unmasked(load, model):
    import torch
    from transformers import SiglipModel, SiglipTokenizer

    folder = Path(model("siglip"))
    encoder = load(encoder=str(folder))
    assert encoder.identity["text"]["tokenizer"] == "SiglipTokenizer"
    assert encoder.identity["image"]["processor"] == "SiglipImageProcessorPil"
    assert (encoder.identity["text"]["max_length"], encoder.identity["text"]["padding"]) == (64, "max_length")

    tokenizer = SiglipTokenizer(str(folder / "spiece.model"))
    pieces = tokenizer.sp_model.encode("red cotton scarf")
    ids = torch.tensor([pieces + [1] * (64 - len(pieces))])
    with torch.no_grad():
        expected = SiglipModel.from_pretrained(folder).get_text_features(input_ids=ids).pooler_output[0]
    np.testing.assert_allclose(encoder.text.texts(["Red cotton scarf!"])[0], expected / expected.norm(), atol=1e-6)


def test_siglip_with_a_tokenizer_of_other_habits_is_fed_as_it_was_trained(load, model, tmp_path):
    folder = tmp_path / "left"
    shutil.copytree(model("siglip"), folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"padding_side": "left", "do_lower_case": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = load(encoder=model("siglip")).text.texts(["Red Cotton scarf"])
    np.testing.assert_allclose(load(encoder=str(folder)).text.texts(["Red Cotton scarf"]), expected, atol=1e-6)


def test_siglip_pictures_are_squeezed_to_the_square_and_scaled_to_one(load, model):
    encoder = load(encoder=model("siglip"))
    prepared = encoder.image.prepare(Image.new("RGB", (100, 50), (255, 0, 127)))
    assert prepared["pixel_values"].shape == (3, 32, 32)
    np.testing.assert_allclose(prepared["pixel_values"][:, 5, 5], [1, -1, 127 / 127.5 - 1], atol=1e-6)


def test_mean_pooling_is_the_mean_over_tokens_and_not_over_padding(load, model):
    import torch
    from transformers import BertModel, BertTokenizer

    folder = model("bert")
    encoder = load(text_model=folder, image_model=model("vit"), text_pooling="mean")
    with torch.no_grad():
        tokens = BertTokenizer.from_pretrained(folder)("mouse", return_tensors="pt")
        mean = BertModel.from_pretrained(folder)(**tokens).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(encoder.text.texts(TEXTS)[2], mean / mean.norm(), atol=1e-6)


def test_the_mean_over_patches_leaves_the_class_token_out(load, model):
    import torch
    from transformers import ViTModel

    folder = model("vit-no-pooler")
    encoder = load(text_model=model("bert"), image_model=folder)
    prepared = encoder.image.prepare(PICTURES[0])
    with torch.no_grad():
        states = ViTModel.from_pretrained(folder, add_pooling_layer=False)(
            torch.from_numpy(prepared["pixel_values"])[None]
        ).last_hidden_state[0]
    assert len(states) == 17
    mean = states[1:].mean(0)
    np.testing.assert_allclose(encoder.image.images([prepared])[0], mean / mean.norm(), atol=1e-6)


def test_texts_are_cut_to_what_the_settings_and_the_model_allow(load, model, reporter):
    pair = {"text_model": model("bert"), "image_model": model("vit")}
    long = "mouse " * 20
    short = load(**pair, max_text_length=8).text
    np.testing.assert_array_equal(short.texts([long])[0], short.texts(["mouse " * 6])[0])
    assert not np.allclose(load(**pair, max_text_length=16).text.texts([long]), short.texts([long]), atol=1e-4)
    assert not reporter.notes
    capped = load(**pair, max_text_length=500)
    assert capped.identity["text"]["max_length"] == 32
    assert any("32 tokens at most" in text for text in reporter.notes)
    assert np.isfinite(capped.text.texts(["mouse " * 400])).all()


def test_a_text_model_without_a_trained_pooler_is_refused_for_pooled_and_taken_for_the_mean(load, model, reporter):
    pair = {"text_model": model("bert-no-pooler"), "image_model": model("vit")}
    with pytest.raises(UsageError, match="no trained pooled output") as caught:
        load(**pair, text_pooling="pooled")
    assert "features.text_pooling=mean" in caught.value.hint
    check_sides(load(**pair, text_pooling="mean"), 16, 16)
    assert load(**pair).identity == load(**pair, text_pooling="mean").identity
    assert any("no trained pooled output" in text for text in reporter.notes)


@pytest.mark.parametrize(
    ("said", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "cls"}, "cls"),
        (None, "mean"),
    ],
)
def test_a_sentence_transformers_model_is_pooled_as_it_was_trained_and_that_is_said(
    load, model, reporter, tmp_path, said, pooling
):
    folder = tmp_path / "sentence"
    shutil.copytree(model("bert"), folder)
    (folder / "modules.json").write_text("[]")
    if said is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    pair = {"text_model": str(folder), "image_model": "sketch"}
    encoder = load(**pair)
    assert encoder.identity["text"]["pooling"] == pooling
    assert any(f"its {pooling} over the tokens" in text for text in reporter.notes)
    explicit = load(text_model=model("bert"), image_model="sketch", text_pooling=pooling)
    assert explicit.identity == encoder.identity
    np.testing.assert_array_equal(explicit.text.texts(TEXTS), encoder.text.texts(TEXTS))
    load(**pair, text_pooling="pooled")
    assert any("text_pooling=auto" in text for text in reporter.warnings)


def test_a_plain_model_is_pooled_as_its_pooler_was_trained(load, model):
    encoder = load(text_model=model("bert"), image_model="sketch")
    assert encoder.identity["text"]["pooling"] == "pooled"


def test_the_fingerprint_follows_weights_and_preprocessing_but_not_the_place(load, model, tmp_path):
    def print_of(**settings):
        return fingerprint(load(**settings).identity)

    pair = {"text_model": model("bert"), "image_model": model("vit")}
    moved = tmp_path / "moved"
    shutil.copytree(pair["image_model"], moved)
    base = print_of(**pair)
    assert print_of(**pair | {"image_model": str(moved)}) == base

    processing = json.loads((moved / "preprocessor_config.json").read_text())
    (moved / "preprocessor_config.json").write_text(json.dumps(processing | {"image_mean": [0.4, 0.4, 0.4]}))
    others = [
        print_of(**pair | {"image_model": str(moved)}),
        print_of(**pair | {"image_model": model("vit", seed=2)}),
        print_of(**pair | {"text_model": model("bert", seed=2)}),
        print_of(**pair, text_pooling="mean"),
        print_of(**pair, max_text_length=16),
        print_of(encoder=model("siglip")),
        print_of(encoder="sketch"),
    ]
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("name", ["sigilp", "resnet50", "…"])
def test_an_unknown_encoder_is_a_usage_error_that_names_the_known(load, name):
    with pytest.raises(UsageError, match="no such encoder") as caught:
        load(encoder=name)
    assert "siglip" in caught.value.hint
    assert "sketch" in caught.value.hint


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_folder_that_is_not_there_is_a_usage_error(load, name):
    with pytest.raises(UsageError, match="no such folder"):
        load(encoder=name)


def test_sides_that_a_model_does_not_have_are_refused(load, model):
    with pytest.raises(UsageError, match="without a text side"):
        load(text_model=model("vit"), image_model=model("vit"))
    with pytest.raises(UsageError, match="without an image side"):
        load(text_model=model("bert"), image_model=model("bert"))


def test_pickled_weights_are_never_loaded(load, model, tmp_path):
    import torch
    from transformers import ViTModel

    folder = tmp_path / "pickled"
    shutil.copytree(model("vit"), folder)
    weights = ViTModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="no weights as safetensors"):
        load(text_model=model("bert"), image_model=str(folder))


def damage_config(folder):
    (folder / "config.json").unlink()


def damage_weights(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)


def damage_half(folder):
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if ".layers.1." not in key and ".layer.1." not in key},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip


def damage_processor(folder):
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize("damage", [damage_config, damage_weights, damage_half, damage_processor])
def test_a_damaged_model_folder_is_a_data_error(load, model, tmp_path, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(model("vit"), folder)
    damage(folder)
    with pytest.raises(DataError, match="damaged"):
        load(text_model=model("bert"), image_model=str(folder))


def test_a_model_whose_class_is_its_own_code_is_refused_with_the_way_out(load, model, tmp_path):
    folder = tmp_path / "open"
    shutil.copytree(model("siglip"), folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "marqo",
        "auto_map": {"AutoModel": "m.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(DataError, match="not a model that can be loaded") as caught:
        load(encoder=str(folder))
    assert "open_clip" in caught.value.hint


def test_a_folder_without_a_tokenizer_is_a_data_error(load, model, tmp_path):
    folder = tmp_path / "speechless"
    shutil.copytree(model("bert"), folder)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(DataError, match="tokenizer"):
        load(text_model=str(folder), image_model=model("vit"))


def test_a_sharded_model_is_loaded_and_a_lost_shard_is_found(load, model, tmp_path):
    from transformers import ViTModel

    folder = tmp_path / "sharded"
    shutil.copytree(model("vit"), folder)
    weights = ViTModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights.save_pretrained(folder, max_shard_size="5KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole, sharded = (load(text_model="sketch", image_model=str(place)) for place in (model("vit"), folder))
    np.testing.assert_array_equal(images(whole, PICTURES), images(sharded, PICTURES))
    shards[0].unlink()
    with pytest.raises(DataError, match="not all of them"):
        load(text_model="sketch", image_model=str(folder))


def test_a_model_that_is_nowhere_is_a_network_error_with_ways_out(load, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NetworkError, match=r"mmm4rec/not-on-this-disk.*cannot be had") as caught:
        load(encoder="mmm4rec/not-on-this-disk")
    for way in ("--text-model", "HF_HOME", "--encoder sketch"):
        assert way in caught.value.hint


def test_a_device_that_is_not_there_is_a_device_error(model, reporter):
    with pytest.raises(DeviceError, match="cuda:77"):
        load_encoder(FeatureSettings(encoder=model("siglip")), "cuda:77", reporter)


def test_loading_writes_nothing_to_the_terminal(load, model, capfd):
    load(encoder=model("siglip")).text.texts(TEXTS)
    written = capfd.readouterr()
    assert (written.out, written.err) == ("", "")


def test_what_the_device_looks_up_is_bit_for_bit_what_the_processor_makes(load, model):
    for kind, resized in (("siglip", True), ("clip", False), ("resnet", False)):
        side = load(text_model="sketch", image_model=model(kind)).image
        assert (type(side.preparer).__name__ == "_Resized") == resized
        for picture in PICTURES:
            given = side.preparer(picture)["pixel_values"]
            assert given.dtype == np.uint8
            np.testing.assert_array_equal(_looked_up(side._levels, given), side.prepare(picture)["pixel_values"])
        as_bytes = next(
            side.stream([{"pixel_values": np.stack([side.preparer(one)["pixel_values"]])} for one in PICTURES])
        )
        np.testing.assert_array_equal(as_bytes, side.images([side.prepare(PICTURES[0])]))
