"""What is run: each row is a training run by the program of ``train_imagenet.py`` and a test of its best weights."""

import argparse
from dataclasses import dataclass
from typing import Optional

from mrconvnext.training.arguments import parse_args

# Equal for all: a ConvNeXt of four stages, whose first sees the images in full resolution.
SHAPE = ("depths=(1,1,2,1)", "dims=(24,48,72,96)", "patch_size=1")
# Wider, the first stage at a quarter of the side (timm halves once more after this stem): narrow ones learn nothing.
DRAWING_SHAPE = ("depths=(1,1,2,1)", "dims=(64,64,128,128)", "patch_size=2")
RECIPE = "--recipe imagenet --no-lr-scaling --ls-init 0.1 --drop-path 0 --model-ema-decay 0".split()
RECIPE += "--mixup 0 --cutmix 0 --reprob 0 --workers 0 --log-interval 20 --checkpoint-interval 200 --aa=".split()
FASHION = "--global-batch 64 --epochs 1 --warmup-epochs 0.1 --lr 4e-3 --scale 0.6 1".split()

CONVNEXT = ("convnext_atto", ())
PAPER = ("mrconvnext_atto", ("branch_norm=batch", "kernel_sizes=0", "bidirectional=False"))
BATCH = ("mrconvnext_atto", ("branch_norm=batch",))
PARSEVAL = ("mrconvnext_atto", ("branch_norm=parseval",))
KERNEL = ("mrconvnext_atto", ("branch_norm=kernel",))
MODELS = {
    "ConvNeXt": CONVNEXT,
    "paper's layer, batch": PAPER,
    "local taps, batch": BATCH,
    "local taps, parseval": PARSEVAL,
    "local taps, kernel": KERNEL,
}

# One thing changed of "local taps, kernel": arguments of the model.
CHANGES = {
    "kernel fourier": ("kernel=fourier",),
    "kernel dilated": ("kernel=dilated",),
    "no local taps": ("kernel_sizes=0",),
    "α starts at 0": ("alpha_init=0.0",),
}

IMAGES = 40_000  # of a pass over Fashion-MNIST
# Those of passes that take "local taps, kernel" about as long as ConvNeXt's take with the blocks of this package, by a
# measurement before the runs.
IMAGES_AT_EQUAL_TIME = 46_000
SEEDS, FEW_SEEDS = range(5), range(3)
COMPARED = ("ConvNeXt", "local taps, kernel")


@dataclass(frozen=True)
class Row:
    """A training run.

    Args:
        group: Table that it belongs to.
        name: Its name there.
        seed: Seed of weights, order and augmentation.
        data: What `data.write` knows the images by.
        options: Arguments of the script beside seed, data and output.
        start: Identifier of the row whose weights it starts from.
        made_for: Side of the images that its kernels were made for, if they were moved to others.
    """

    group: str
    name: str
    seed: int
    data: str
    options: tuple[str, ...]
    start: Optional[str] = None
    made_for: Optional[int] = None

    @property
    def identifier(self) -> str:
        words = "".join(c if c.isalnum() or c == "." else "-" for c in f"{self.group} {self.name}")
        return f"{words}-{self.seed}"

    @property
    def arguments(self) -> argparse.Namespace:
        """The script's arguments as it reads them."""
        return parse_args([*self.options, "--output", self.identifier])

    @property
    def spec(self) -> str:
        """The model as ``benchmark_throughput.py`` takes it."""
        args = self.arguments
        moved = {"kernel_img_size": self.made_for} if self.made_for else {}
        return ":".join([args.model, *(f"{key}={value}" for key, value in {**args.model_kwargs, **moved}.items())])


def model(spec: tuple[str, tuple[str, ...]], shape: tuple[str, ...] = SHAPE, *more: str) -> tuple[str, ...]:
    return ("--model", spec[0], "--model-kwargs", *shape, *spec[1], *more)


def fashion(spec: tuple[str, tuple[str, ...]], *more: str) -> tuple[str, ...]:
    return (*model(spec, SHAPE, *more), *RECIPE, *FASHION, "--img-size", "16")


def main_rows() -> list[Row]:
    """Returns all models from scratch on Fashion-MNIST, one pass; the slow ones at fewer seeds."""
    return [
        Row("main", name, seed, f"fashion-{IMAGES}", fashion(spec))
        for seed in SEEDS
        for name, spec in MODELS.items()
        if seed in FEW_SEEDS or "batch" not in name
    ]


def longer_rows() -> list[Row]:
    """Returns both models that the README compares, two passes: of as many images, and of as many as take as long."""
    rows = []
    for seed in SEEDS:
        for group, name, images in (
            *(("two passes", name, IMAGES) for name in COMPARED),
            ("equal time", "local taps, kernel", IMAGES_AT_EQUAL_TIME),
        ):
            rows.append(Row(group, name, seed, f"fashion-{images}", (*fashion(MODELS[name]), "--epochs", "2")))
    return rows


def change_rows() -> list[Row]:
    """Returns the layer with local taps and one thing changed, one pass."""
    return [
        Row("changes", name, seed, f"fashion-{IMAGES}", fashion(KERNEL, *arguments))
        for seed in FEW_SEEDS
        for name, arguments in CHANGES.items()
    ]


def fine_tuning_rows() -> list[Row]:
    """Returns ConvNeXts trained on half of the classes, then tuned on the other half: as they are, and converted."""
    rows = []
    tuned = "--img-size 16 --global-batch 64 --epochs 3 --warmup-epochs 0.1 --lr 1e-3 --scale 0.6 1".split()
    for seed in SEEDS:
        first = Row("before fine-tuning", "ConvNeXt", seed, "fashion-first-half", fashion(CONVNEXT))
        rows.append(first)
        for name in COMPARED:
            options = (*model(MODELS[name]), *RECIPE, *tuned)
            rows.append(Row("fine-tuning", name, seed, "fashion-second-half", options, first.identifier))
    return rows


def drawing_rows() -> list[Row]:
    """Returns the models on drawings in which two discs are joined by a curve or not, at 32 px, then some at 64 px."""
    rows = []
    for seed in SEEDS:
        for name in COMPARED:
            before = before_drawing_row(name, seed)
            first = drawing_row("drawings 32", before, 32, 4)
            rows += [before, first]
            if seed in FEW_SEEDS:
                rows.append(drawing_row("drawings 64, 2 passes", first, 64, 2))
    return rows


def before_drawing_row(name: str, seed: int) -> Row:
    """Returns a pass over Fashion-MNIST at the drawings' size: in first trials none left chance from scratch."""
    options = (*model(MODELS[name], DRAWING_SHAPE), *RECIPE, *FASHION, "--img-size", "32")
    return Row("before drawings", name, seed, "fashion-27000", options)


def drawing_row(group: str, first: Row, side: int, epochs: int) -> Row:
    recipe = f"--img-size {side} --global-batch 64 --epochs {epochs} --lr 1e-3 --warmup-epochs 0.5"
    recipe += " --scale 0.99 1 --crop-pct 1 --smoothing 0"
    options = (*model(MODELS[first.name], DRAWING_SHAPE), *RECIPE, *recipe.split())
    moved = first.name != "ConvNeXt" and side != first.arguments.img_size
    made_for = first.arguments.img_size if moved else None
    return Row(group, first.name, first.seed, f"drawings-{side}", options, first.identifier, made_for)


# What becomes of the kernels of a model that goes on at another size of images.
GOING_ON = {
    "ConvNeXt": (CONVNEXT, ()),
    "kept kernels": (KERNEL, ("--keep-kernels",)),
    "resampled kernels": (KERNEL, ()),
}
LARGER_SIDES = (48, 64)


def resolution_rows() -> list[Row]:
    """Returns models trained on Fashion-MNIST at 32 px, and their going on for a pass at larger sizes."""
    rows = []
    tuned = "--global-batch 64 --epochs 1 --warmup-epochs 0.1 --lr 5e-4 --scale 0.6 1".split()
    for seed in FEW_SEEDS:
        for name, (spec, keeping) in GOING_ON.items():
            first = before_resolution_row(spec, seed)
            rows.append(first)
            for side in LARGER_SIDES:
                options = (*model(spec, DRAWING_SHAPE), *RECIPE, *tuned, "--img-size", str(side), *keeping)
                rows.append(Row(f"resolution {side}", name, seed, "fashion-10000", options, first.identifier))
    return rows


def before_resolution_row(spec: tuple[str, tuple[str, ...]], seed: int) -> Row:
    """Returns three passes over 20,000 images of Fashion-MNIST at 32 px."""
    name = next(name for name, own in MODELS.items() if own == spec)
    options = (*model(spec, DRAWING_SHAPE), *RECIPE, *FASHION, "--epochs", "3", "--img-size", "32")
    return Row("resolution 32", name, seed, "fashion-20000", options)


# EfficientNet-Lite0 with its ImageNet weights, as timm has it and with global kernels (experiments.photographs).
LITE = {"EfficientNet-Lite0": "tf_efficientnet_lite0", "global kernels": "tf_efficientnet_lite0_global"}
LITE_WEIGHTS = "data/weights/lite0.safetensors"
LITE_RECIPE = "--recipe imagenet --no-lr-scaling --drop-path 0 --model-ema-decay 0 --mixup 0 --cutmix 0"
LITE_RECIPE += " --reprob 0 --workers 0 --log-interval 5 --checkpoint-interval 1000 --aa= --channels-last --crop-pct 1"
LITE_RECIPE += " --global-batch 16 --lr 5e-4 --warmup-epochs 0.5 --scale 0.5 1"


def photograph_rows() -> list[Row]:
    """Returns both networks tuned on photographs of solar cells and on emoji: of as many images, and of as many as take
    as long."""
    rows = []
    for kind, side, epochs, images, fewer in (("solar", 300, 2, 400, 350), ("emoji", 64, 6, 1200, 1050)):
        options = (*LITE_RECIPE.split(), "--img-size", str(side), "--epochs", str(epochs))
        for seed in FEW_SEEDS:
            for group, name, count in (
                *((kind, name, images) for name in LITE),
                (f"{kind}, equal time", "global kernels", fewer),
            ):
                start = (f"start={LITE_WEIGHTS}", f"img_size={side}")
                if name == "EfficientNet-Lite0":
                    start = (f"pretrained_cfg_overlay={dict(file=LITE_WEIGHTS)}", "--pretrained")
                arguments = ("--model", LITE[name], "--model-kwargs", *start, *options)
                rows.append(Row(group, name, seed, f"{kind}-{count}", arguments))
    return rows


def all_rows() -> list[Row]:
    """Returns every row once."""
    rows = [*main_rows(), *longer_rows(), *drawing_rows(), *fine_tuning_rows(), *change_rows(), *photograph_rows()]
    return list(dict.fromkeys([*rows, *resolution_rows()]))
