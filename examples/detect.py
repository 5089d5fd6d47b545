"""A detector of torchvision with an MRConvNeXt backbone, trained at 128 pixels and used at 192.

    pip install -e ".[train]"
    python examples/detect.py

It finds handwritten digits on photographs. Takes a minute on two CPU cores.
"""

import timm
import torch
from scenes import scenes
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou
from tqdm import tqdm

import mrconvnext

SIDE, LARGER = 128, 192
PICTURES = 400


class Backbone(nn.Module):
    """The feature map of stride 8 of a model of timm, with what lies deeper added to it."""

    out_channels = 64

    def __init__(self, side: int) -> None:
        super().__init__()
        options = {"img_size": side, "ls_init_value": 0.1, "out_indices": (1, 2, 3)}
        self.body = timm.create_model("mrconvnext_atto", features_only=True, **options)
        self.to_common = nn.ModuleList(
            nn.Conv2d(n, self.out_channels, kernel_size=1) for n in self.body.feature_info.channels()
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [layer(own) for layer, own in zip(self.to_common, self.body(x))]
        size = features[0].shape[2:]
        return sum(nn.functional.interpolate(own, size=size, mode="bilinear") for own in features)


def main() -> None:
    torch.manual_seed(0)
    model = FCOS(
        backbone=Backbone(SIDE),
        num_classes=2,
        min_size=SIDE,
        max_size=LARGER,
        anchor_generator=AnchorGenerator(sizes=((8,),), aspect_ratios=((1.0,),)),
    )
    train(model, scenes(SIDE, PICTURES, seed=0))
    print(f"{SIDE} px: {overlap(model, SIDE):.2f}")
    model.transform.min_size = (LARGER,)
    print(f"{LARGER} px, kernels as they are: {overlap(model, LARGER):.2f}")
    model.backbone = mrconvnext.resample(model.backbone, LARGER)
    print(f"{LARGER} px, kernels moved: {overlap(model, LARGER):.2f}")


def train(model: nn.Module, pictures: list) -> None:
    optimizer = torch.optim.AdamW(params=model.parameters(), lr=5e-4)
    model.train()
    for chosen in tqdm(torch.randperm(3 * len(pictures)).remainder(len(pictures)).split(8)):
        own = [pictures[i] for i in chosen]
        targets = [{"boxes": box[None], "labels": torch.tensor([1])} for _, _, box in own]
        optimizer.zero_grad()
        sum(model([image for image, _, _ in own], targets).values()).backward()
        optimizer.step()


@torch.no_grad()
def overlap(model: nn.Module, side: int) -> float:
    """Returns the mean intersection over union of the surest box and the true one, over 50 new scenes of a size."""
    found = []
    for image, _, box in scenes(side, 50, seed=1):
        boxes = model.eval()([image])[0]["boxes"][:1]
        found.append(box_iou(boxes, box[None]).item() if len(boxes) else 0.0)
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
