"""Images that visitors of the page give, which may be anything."""

from __future__ import annotations

import warnings

import pytest
from PIL import Image
from serving_cases import pictures, processor

from peft_cl.serving.images import MOST_PIXELS, ImageFault, read_image


def test_images_of_visitors(tmp_path):
    whole = tmp_path / "a.png"
    pictures("a", 1)[0].save(whole)
    assert read_image(str(whole), processor()).size == (16, 16)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:60])
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    (tmp_path / "empty.png").touch()
    Image.new("1", (MOST_PIXELS // 1000 + 1, 1000)).save(tmp_path / "large.png")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    for name, expected in (
        ("cut", "is damaged"),
        ("text", "not one that can be read"),
        ("empty", "not one that can be read"),
        ("large", "Make it smaller"),
        ("bomb", "far too many pixels"),
    ):
        with warnings.catch_warnings(), pytest.raises(ImageFault, match=expected) as fault:
            warnings.simplefilter("error")
            read_image(str(tmp_path / f"{name}.png"), processor())
        assert str(tmp_path) not in str(fault.value)
