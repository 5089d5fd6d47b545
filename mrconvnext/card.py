"""The card of a model: what the Hub's page of it says."""

from collections.abc import Sequence
from typing import Any, Optional

from huggingface_hub import ModelCardData

from .mrconvnext import MRConvNeXt

# Licences that a card may name without saying more; timm gives others by a name of their own.
KNOWN_LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0")

DESCRIPTION = (
    "An image model of mrconvnext: a ConvNeXt whose depthwise convolutions also look at the whole image, by "
    "multi-resolution convolutions ([MRConv, NeurIPS 2024](https://arxiv.org/abs/2408.09453))."
)

CARD = """---
{data}
---

# Model card for {title}

{description}

## Model Details

{details}

## Model Usage

```python
import timm
import mrconvnext  # registers the models

model = timm.create_model("{name}", pretrained=True).eval()
```
"""


# Names of classes that a card lists, at most.
LISTED = 20


def card(model: MRConvNeXt, name: str, more: dict[str, Any], classes: Optional[Sequence[str]] = None) -> str:
    """Returns a model's card: what the Hub reads of it, then text.

    Args:
        model: The model.
        name: What timm makes it by.
        more: What else is to be said of it, by name.
        classes: The names of its classes, if they are known.
    """
    cfg = model.pretrained_cfg
    listed = f": {', '.join(classes)}" if classes and len(classes) <= LISTED else ""
    details = {
        "Architecture": cfg["architecture"],
        "Parameters (M)": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        "Image size": " x ".join(str(side) for side in cfg["input_size"][1:]),
        "Classes": f"{model.num_classes}{listed}",
        "Started from": model.started_from or "not recorded",
        "Licence": cfg.get("license") or "not stated",
        **more,
    }
    license = cfg.get("license")
    known: Any = {"license": "other", "license_name": license}
    if license in (None, *KNOWN_LICENSES):
        known = {"license": license}
    tags = ["image-classification", "timm", "mrconvnext"]
    data = ModelCardData(tags=tags, pipeline_tag="image-classification", library_name="timm", **known)
    return CARD.format(
        data=data.to_yaml(),
        title=name.partition(":")[2].rpartition("/")[2],
        description=DESCRIPTION,
        details="\n".join(f"- **{key}:** {value}" for key, value in details.items()),
        name=name,
    )
