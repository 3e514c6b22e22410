"""The HTML report and its pictures."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from elision.runtime import bench, pictures
from elision.runtime.report import render, token_pictures
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image as reader

import elision

from . import toys


class Checker(HTMLParser):
    """Every tag is closed in order, and nothing is loaded from anywhere."""

    VOID = {"meta", "img", "br", "line", "rect", "!doctype"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href"):
                assert value.startswith("data:"), value
                self.images.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert not checker.open
    assert "http://" not in html and "https://" not in html
    return checker


def test_report_of_an_onnx_result(onnx_file):
    result = elision.optimize(onnx_file, "toy-drop-relu{times=2}")
    html = render(result, {"x": np.zeros((2, 8), np.float32)}, title="<script>alert(1)</script>")
    assert not checked(html).images
    assert "<script>" not in html
    assert "toy-drop-relu{times=2}" in html
    assert 'class="removed"' in html
    assert "relus: 2" in html


def test_measured_times_and_remarks(onnx_file):
    result = elision.optimize(onnx_file, "toy-drop-relu")
    timed = bench.compare({"a": [0.2, 0.2, 0.2], "b": [0.1, 0.1, 0.1]})
    html = render(result, comparison=timed, remarks=["A remark."])
    checked(html)
    assert "2.00x" in html and "A remark." in html


@pytest.mark.parametrize("host", ["torch", "onnx"])
def test_picture_of_the_merged_tokens(host, tmp_path):
    x = torch.rand(2, 3, 32, 32)
    model = toys.ImageModel().eval()
    if host == "torch":
        result = elision.optimize(model, "toy-map", (x,), token_map=True)
    else:
        result = elision.export_onnx(model, (x,), tmp_path / "m.onnx", "toy-map", token_map=True)
    images = checked(render(result, (x,))).images
    assert len(images) == 4  # two images, before and after
    picture = decoded(images[1])
    assert picture.shape[0] == picture.shape[1] >= 32
    assert "16 patches became 11 tokens" in render(result, (x,))
    without = elision.optimize(model, "toy-map", (x,))
    assert token_pictures(without, (x,)) == []


def decoded(uri: str) -> np.ndarray:
    data = base64.b64decode(re.sub("^data:image/png;base64,", "", uri))
    return (reader.imread(io.BytesIO(data), format="png")[..., :3] * 255).round().astype(np.uint8)


def test_patches_of_one_slot_share_colour_and_outline():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 200
    slot = np.array([0, 0, 1, -1])  # the upper two are one token of mean 100, the last is dropped
    picture = pictures.merged_picture(image, slot, (2, 2))
    size = picture.shape[0] // 2
    middle = size // 2
    assert (picture[middle, middle] == 100).all() and (picture[middle, size + middle] == 100).all()
    assert (picture[size + middle, middle] == 0).all()
    assert (picture[size + middle, size + middle] == 30).all()
    outline = picture[0, 0]
    assert (outline != 100).any()
    assert (picture[0, -1] == outline).all()
    assert (picture[middle, size - 1] == 100).all()  # no line between patches of one slot


@given(
    rows=st.integers(2, 20), columns=st.integers(2, 20), prefix=st.integers(0, 5), patch=st.integers(8, 16)
)
def test_the_grid_is_found_from_the_number_of_tokens(rows, columns, prefix, patch):
    place = pictures.place_patches(rows * columns + prefix, rows * patch, columns * patch, prefix)
    assert place == (prefix, (rows, columns))


def test_images_of_every_sort():
    assert pictures.as_image(np.zeros((3, 8, 8), np.float32)).shape == (8, 8, 3)
    assert pictures.as_image(np.full((8, 8, 3), 255, np.uint8)).max() == 255
    assert pictures.as_image(np.full((1, 8, 8), 255.0)).min() == 255
    assert (
        pictures.as_image(np.zeros((3, 8, 8)) - pictures.MEAN[:, None, None] / pictures.STD[:, None, None])
        == 0
    ).all()
    assert pictures.as_image(np.zeros((5, 8, 8))) is None
    assert pictures.as_image(np.full((3, 8, 8), np.nan)).shape == (8, 8, 3)


def test_chart():
    svg = pictures.tokens_chart([197.0] * 3, [197.0, 181.0, 165.0])
    assert svg.count("<rect") == 6 and "165 tokens" in svg
    assert pictures.tokens_chart([], []) == ""


def test_one_run_serves_the_report_and_the_file(tmp_path):
    x = torch.rand(2, 3, 32, 32)
    model = toys.ImageModel().eval()
    result = elision.export_onnx(model, (x,), tmp_path / "m.onnx", "toy-map", token_map=True)
    plain = result.without_token_map()
    assert [output.name for output in result.model.graph.output][-1] == "elision_token_map"
    assert len(plain.model.graph.output) == 1
    (found,) = elision.session(plain.model.SerializeToString()).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)
    with pytest.raises(elision.ElisionError):
        elision.optimize(model, "toy-map", (x,), token_map=True).without_token_map()
