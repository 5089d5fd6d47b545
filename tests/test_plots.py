from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import small_model
from PIL import Image

from mrconvnext.plots import plot_alpha_norms, plot_kernels, plot_receptive_fields


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
