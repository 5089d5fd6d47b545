"""A segmenter with an MRConvNeXt encoder, trained at 96 pixels and used at 160: as it is, and with moved kernels.

    pip install -e ".[train]" segmentation-models-pytorch
    python examples/segment.py

It finds the strokes of handwritten digits on photographs. Takes a minute on two CPU cores.
"""

import segmentation_models_pytorch as smp
import torch
from scenes import scenes
from torch import nn
from tqdm import tqdm

import mrconvnext

SIDE, LARGER = 96, 160
PICTURES = 640


def main() -> None:
    torch.manual_seed(0)
    # timm's models by name, as encoders: kernels for the images that are trained on, layer scales that learn soon.
    options = {"img_size": SIDE, "ls_init_value": 0.1}
    model = smp.Unet(
        "tu-mrconvnext_atto", encoder_weights=None, encoder_depth=4, decoder_channels=(128, 64, 32, 16), **options
    )
    train(model, scenes(SIDE, PICTURES, seed=0))
    print(f"{SIDE} px: {overlap(model, SIDE):.2f}")
    print(f"{LARGER} px, kernels as they are: {overlap(model, LARGER):.2f}")
    moved = mrconvnext.resample(model, LARGER)
    print(f"{LARGER} px, kernels moved: {overlap(moved, LARGER):.2f}")


def train(model: nn.Module, pictures: list) -> None:
    images, masks = (torch.stack(own) for own in list(zip(*pictures))[:2])
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=1e-3)
    loss = nn.BCEWithLogitsLoss()
    model.train()
    for chosen in tqdm(torch.randperm(3 * len(images)).remainder(len(images)).split(16)):
        optimizer.zero_grad()
        loss(model(images[chosen])[:, 0], masks[chosen].float()).backward()
        optimizer.step()


@torch.no_grad()
def overlap(model: nn.Module, side: int) -> float:
    """Returns intersection over union of found and true strokes, over 100 new scenes of a size."""
    images, masks = (torch.stack(own) for own in list(zip(*scenes(side, 100, seed=1)))[:2])
    found = torch.cat([model.eval()(own)[:, 0] > 0 for own in images.split(10)])
    return ((found & masks).sum() / (found | masks).sum()).item()


if __name__ == "__main__":
    main()
