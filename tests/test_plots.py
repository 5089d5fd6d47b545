import base64
import copy
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import assert_agree, images, layers_of, model_in, small_model
from PIL import Image
from timm.models.convnext import ConvNeXt

import mrconvnext
from mrconvnext.cli import main
from mrconvnext.convert import without_branches
from mrconvnext.page import about_plain
from mrconvnext.plots import plot_alpha_norms, plot_kernels, plot_layer, plot_receptive_fields, receptive_fields


@pytest.mark.parametrize("options", [dict(), dict(branch_norm="batch", bidirectional=False, kernel_sizes=0)])
def test_picture_shows_every_branch_of_a_layer_of_each_stage(options: dict) -> None:
    model = small_model(**options)
    figure = plot_kernels(model)
    titles = [ax.get_title() for ax in figure.axes]
    for stage in model.stages:
        for length in stage.blocks[0].conv_dw.branch_lengths:
            assert any(title.startswith(f"length {length}\n") for title in titles)
    assert titles.count("merged, colours of what\nlies beyond the taps") == 4


def test_picture_can_be_saved(tmp_path: Path) -> None:
    plot_kernels(small_model()).savefig(tmp_path / "kernels.png")
    with Image.open(tmp_path / "kernels.png") as picture:
        assert min(picture.size) > 500


def test_deployed_model_shows_its_merged_kernels() -> None:
    figure = plot_kernels(small_model().reparameterize())
    assert [ax.get_title() for ax in figure.axes].count("merged, colours of what\nlies beyond the taps") == 4
    assert not any("branches" in ax.get_title() or "length" in ax.get_title() for ax in figure.axes)


def test_alpha_norms_show_every_branch_as_it_is() -> None:
    model = small_model()
    layer = model.stages[1].blocks[0].conv_dw
    layer.alpha.data.zero_()
    layer.alpha.data[2] = torch.tensor([3.0, -4.0]).repeat(layer.alpha.shape[1] // 2)
    (picture,) = plot_alpha_norms(model).axes[0].images
    weights, depth = picture.get_array(), len(model.stages[0].blocks)
    assert weights[2, depth] == pytest.approx(12.5**0.5) and weights[:2, depth].sum() == 0
    first = model.stages[0].blocks[0].conv_dw.alpha
    assert np.allclose(weights[: len(first), 0], first.detach().square().mean(1).sqrt())
    with pytest.raises(RuntimeError, match="branches"):
        plot_alpha_norms(small_model().reparameterize())


def test_receptive_fields_show_what_a_stage_sees() -> None:
    """A ConvNeXt's first stage sees as far as its 7×7 taps reach, an MRConvNeXt's all rows."""
    ours = small_model(img_size=96)
    convnext = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), ls_init_value=1.0).eval()
    figure = plot_receptive_fields({"ConvNeXt": convnext, "ours": ours}, torch.randn(2, 3, 96, 96))
    panels = {ax.get_title(): ax.images[0].get_array() for ax in figure.axes if ax.images}
    assert (panels["ConvNeXt, stage 1"] > -12).sum() == (7 * 4) ** 2
    assert (panels["ours, stage 1"] > -12).any(1).all()


# The ConvNeXt beside a model


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("name", ["mrconvnext_atto", "mrconvnextv2_atto"])
def test_plain_convnext_is_the_model_with_its_branches_closed(name: str, deployed: bool) -> None:
    model = small_model(name)
    closed = copy.deepcopy(model)
    plain = without_branches(model.reparameterize() if deployed else model)
    for layer in layers_of(closed):
        layer.alpha.data.zero_()
    assert type(plain) is ConvNeXt and not layers_of(plain) and layers_of(model)
    with torch.no_grad():
        assert_agree(plain(images()), closed(images()))


def test_plain_convnext_is_said_to_be_what_it_is() -> None:
    assert "with its branches closed, α = 0" in about_plain(small_model())
    folded = about_plain(model_in("kernel", deployed=True))
    assert "folded" in folded and "biases" not in folded and "random" not in folded
    assert "Its biases hold what the norms" in about_plain(model_in("batch", deployed=True))

    without_taps = small_model(kernel_sizes=(0, 7, 5, 0))
    assert "no local taps in stages 1, 4: its convolutions there are new, 7×7" in about_plain(without_taps)
    plain, again = without_branches(without_taps), without_branches(without_taps)
    assert [stage.blocks[0].conv_dw.kernel_size[0] for stage in plain.stages] == [7, 7, 5, 7]
    with torch.no_grad():
        assert torch.equal(plain(images()), again(images()))
    assert "add next to nothing" in about_plain(timm.create_model("mrconvnext_atto", img_size=64))
    assert "add next to nothing" not in about_plain(small_model("mrconvnextv2_atto"))


@pytest.mark.parametrize("taps", [7, 0])
def test_plain_kernel_stands_at_the_scale_of_the_merged_one(taps: int) -> None:
    layer = small_model(kernel_sizes=taps).stages[0].blocks[0].conv_dw
    channel = int(layer.alpha.abs().sum(0).argmax())
    conv = torch.nn.Conv2d(layer.channels, layer.channels, 7, padding=3, groups=layer.channels)
    pictures = {
        text: figure.axes[0].images[0] for text, figure in plot_layer(layer, conv).items() if figure.axes[0].images
    }
    merged, plain = list(pictures.values())[:2]
    assert merged.get_extent() == plain.get_extent()
    image, (left, _, bottom, _) = plain.get_array(), plain.get_extent()
    row, column = int(bottom - 0.5), int(-left - 0.5)  # of the middle
    assert np.array_equal(image[row - 3 : row + 4, column - 3 : column + 4], conv.weight[channel, 0].detach())
    assert np.count_nonzero(image) == 49


# The page


class Page(HTMLParser):
    """What a reader of a page gets: its text, its images and its tags, each of which must be closed."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.text, self.images, self.tags, self.open = "", [], [], []
        self.feed(self.html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def plotted(model: mrconvnext.MRConvNeXt, folder: Path, capsys: pytest.CaptureFixture) -> Page:
    """Returns the page of a model, which is written by way of a folder ``source``."""
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    mrconvnext.save(model, folder / "source")
    capsys.readouterr()
    assert main(["plot", str(folder / "source"), "--output", str(folder / "out")]) == 0
    captured = capsys.readouterr()
    assert not captured.err
    names = [f"{name}.png" for name in ("kernels", "alpha", "receptive-fields")] + ["index.html"]
    if layers_of(model)[0].kernel is not None:
        names.remove("alpha.png")
    assert captured.out.splitlines() == [str(folder / "out" / name) for name in names]
    assert {file.name for file in (folder / "out").iterdir()} == set(names)
    return Page(folder / "out" / "index.html")


@pytest.mark.parametrize("deployed", [False, True])
def test_page_shows_a_model_beside_the_plain_convnext(
    deployed: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    page = plotted(model_in("kernel", deployed), tmp_path, capsys)
    assert page.html.startswith("<!DOCTYPE html>") and page.tags[0] == ("html", {"lang": "en"})
    own, other = ["deployed form", "whose kernel is"], ["training form", "whose branches weigh", "α = 0"]
    own, other = (own, other) if deployed else (other, own)
    assert all(words in page.text for words in ["mrconvnext_atto looks at", "64×64", *own])
    assert not any(words in page.text for words in other)
    for layer in layers_of(small_model()):
        lengths = f"branches: {', '.join(map(str, layer.branch_lengths))} lags"
        assert (lengths in page.text) != deployed
    alts = [image["alt"] for image in page.images]
    for stage in range(1, 5):
        ours, plain = (
            [float(alt.split()[-2]) for alt in alts if alt.startswith(f"Stage {stage}. {name}: ")]
            for name in ("This model", "Plain ConvNeXt")
        )
        assert len(ours) == len(plain) == 1 and ours >= plain
        assert f"Stage {stage}. The plain ConvNeXt's kernel at the same scale." in alts
        assert any(alt.startswith(f"Stage {stage}. The branch of ") for alt in alts) != deployed
    assert any("mean square of α" in alt for alt in alts) != deployed
    assert "is farthest ahead in stage" in page.text


def test_page_needs_nothing_beside_it_and_takes_names_as_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / '<b title="x">&amp;'
    page = plotted(model_in("kernel", deployed=True), folder, capsys)
    assert str(folder / "source") in page.text
    assert not {tag for tag, _ in page.tags} & {"b", "link", "script", "iframe", "object"}
    for image in page.images:
        kind, data = image["src"].split(",")
        assert kind == "data:image/png;base64" and image["alt"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            # Two pixels for one of the page.
            assert picture.size[0] // 2 == int(image["width"]) and picture.size[1] // 2 == int(image["height"])
    assert not any(word in page.html for word in ("http:", "https:", "url("))
    assert "prefers-color-scheme: dark" in page.html


def test_a_model_whose_branches_are_closed_is_ahead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = small_model()
    for layer in layers_of(model):
        layer.alpha.data.zero_()
    assert "and is ahead in none." in plotted(model.reparameterize(), tmp_path, capsys).text


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_model_that_sees_nothing_has_no_receptive_fields(value: float) -> None:
    model = small_model().eval()
    with torch.no_grad():
        model.stem[0].weight.fill_(value)
    with pytest.raises(ValueError, match="sees nothing in stage 1"):
        receptive_fields(model, torch.randn(2, 3, 32, 32))
