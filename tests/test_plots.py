from pathlib import Path

import pytest
from helpers import small_model
from PIL import Image

from mrconvnext.plots import plot_kernels


@pytest.mark.parametrize("options", [dict(), dict(branch_norm="parseval", bidirectional=False, kernel_sizes=0)])
def test_picture_shows_every_branch_of_a_layer_of_each_stage(options: dict, tmp_path: Path) -> None:
    model = small_model(**options)
    figure = plot_kernels(model)
    titles = [ax.get_title() for ax in figure.axes]
    for stage in model.stages:
        for length in stage.blocks[0].conv_dw.branch_lengths:
            assert any(title.startswith(f"length {length}\n") for title in titles)
    assert titles.count("merged") == 4
    figure.savefig(tmp_path / "kernels.png")
    with Image.open(tmp_path / "kernels.png") as picture:
        assert min(picture.size) > 500


def test_deployed_model_is_refused() -> None:
    with pytest.raises(RuntimeError, match="branches"):
        plot_kernels(small_model().reparameterize())
