import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmm4rec_cli.features.sketch import SketchImage, SketchText


def picture(background, draw=lambda pen: None, size=(80, 50)):
    image = Image.new("RGB", size, background)
    draw(ImageDraw.Draw(image))
    return image


def image_vectors(*pictures):
    encoder = SketchImage()
    return encoder.images([encoder.prepare(one) for one in pictures])


def stripes(pen, upright):
    for place in range(0, 80, 8):
        pen.rectangle((place, 0, place + 3, 50) if upright else (0, place, 80, place + 3), fill="black")


def test_texts_become_unit_vectors_and_do_not_depend_on_their_company():
    texts = ["a red cotton scarf", "wireless mouse with usb receiver", "ein Buch über Katzen"]
    together = SketchText().texts(texts)
    assert together.shape == (3, SketchText.width)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_array_equal(SketchText().texts([text])[0], row)


def test_texts_that_share_words_lie_closer():
    scarf, shawl, mouse = SketchText().texts(
        ["warm red cotton scarf for winter", "red cotton shawl, warm in winter", "wireless mouse with usb receiver"]
    )
    assert scarf @ shawl > 0.4
    assert scarf @ mouse < 0.3


def test_a_text_without_a_word_gets_zeros():
    assert not SketchText().texts(["!!! ..."]).any()


def test_the_map_is_the_same_on_every_machine_and_release():
    # numbers of scikit-learn 1.9.1: other ones would silently part pre-trained weights from new features
    vector = SketchText().texts(["red cotton scarf"])[0]
    np.testing.assert_allclose(vector[:4], GOLDEN_TEXT, atol=1e-6)


GOLDEN_TEXT = [0.060954850, 0.024099268, 0.021898013, -0.032618489]


def test_pictures_become_unit_vectors_and_do_not_depend_on_their_company():
    pictures = [picture("red"), picture("white", lambda pen: stripes(pen, True))]
    together = image_vectors(*pictures)
    assert together.shape == (2, SketchImage.width)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(image_vectors(pictures[1])[0], together[1])


def test_colours_and_directions_of_edges_tell_pictures_apart():
    red, dark_red, blue = image_vectors(picture("#f01010"), picture("#e00808"), picture("#1010f0"))
    assert red @ dark_red == pytest.approx(1)
    assert red @ blue == pytest.approx(0)
    upright, flat = image_vectors(
        picture("white", lambda pen: stripes(pen, True)), picture("white", lambda pen: stripes(pen, False))
    )
    assert upright[64:] @ flat[64:] < 0.1
    assert upright[:64] @ flat[:64] > 0.3


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (2000, 3)])
def test_any_shape_of_picture_is_taken(size):
    assert np.isfinite(image_vectors(picture("green", size=size))).all()
