"""What is measured: a row for every model, form, batch size and image size."""

import argparse
import dataclasses
import itertools
from typing import Optional

import timm
from timm.models import is_model_in_modules

# The forms that a model of a timm module is measured in, the first as it is made.
FORMS = {"mrconvnext": ("training form", "deployed"), "convnext": ("default", "conv_mlp", "fused blocks")}

# Forms that are made of another one's weights and give the same logits.
DERIVED = {"deployed": "training form", "fused blocks": "default"}


@dataclasses.dataclass
class Row:
    """What is measured of a model in one form, at one batch and image size."""

    model: str
    form: str
    batch_size: int
    img_size: int
    ms: list[float] = dataclasses.field(default_factory=list)  # of a forward pass or a training step, one a round
    memory_mib: list[float] = dataclasses.field(default_factory=list)  # peak, one a fresh process
    first_ms: Optional[float] = None  # of the first forward pass
    parameters: Optional[int] = None
    gflops: Optional[float] = None
    gflops_per_pass: Optional[float] = None
    error: Optional[float] = None
    note: str = ""

    def __str__(self) -> str:
        return f"{self.model} ({self.form}), {self.size}"

    @property
    def size(self) -> str:
        return f"batch {self.batch_size}, {self.img_size} px"


def make_rows(args: argparse.Namespace) -> list[Row]:
    """Returns empty rows for the models asked for, each after the one that its ratios are to."""
    models = [name for model in args.models for name in (reference_of(model, args.reference), model) if name]
    return [
        Row(model, form, batch_size, img_size)
        for batch_size, img_size in itertools.product(args.batch_sizes, args.img_sizes)
        for model in dict.fromkeys(models)
        for form in forms_of(model, args)
    ]


def reference_of(model: str, reference: Optional[str]) -> Optional[str]:
    """Returns the model that the ratios of a model are to: the given one, or else the ConvNeXt of the model's size."""
    if reference:
        return reference
    names = [f"convnext_{word}" for word in model.split(":")[0].split("_")]
    return next((name for name in names if timm.is_model(name)), None)


def forms_of(model: str, args: argparse.Namespace) -> list[str]:
    """Returns the forms that a model is measured in, without those that would be another one measured twice."""
    name = model.split(":")[0]
    families = (forms for module, forms in FORMS.items() if is_model_in_modules(name, module_names=[module]))
    forms = list(next(families, ("default",)))
    excluded = {"deployed"} if args.train else set()
    if args.compile or args.device != "cpu":
        excluded.add("fused blocks")  # timm's own there
    return [form for form in forms if form not in excluded]
