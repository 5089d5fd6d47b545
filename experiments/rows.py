"""What is run: each row is one call of ``train_imagenet.py``."""

import argparse
from dataclasses import dataclass
from typing import Optional

from mrconvnext.training.arguments import parse_args

# Equal for all: a ConvNeXt of four stages, whose first sees the images in full resolution.
SHAPE = ("depths=(1,1,2,1)", "dims=(24,48,72,96)", "patch_size=1")
# Wider, the first stage at a quarter of the side (timm halves once more after this stem): narrow ones learn nothing.
PATHFINDER_SHAPE = ("depths=(1,1,2,1)", "dims=(64,64,128,128)", "patch_size=2")
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
NORMS = ("local taps, batch", "local taps, parseval", "local taps, kernel")

# One thing changed of "local taps, parseval": arguments of the model, and of the script.
CHANGES = {
    "kernel fourier": (("kernel=fourier",), ()),
    "kernel dilated": (("kernel=dilated",), ()),
    "kernel sparse": (("kernel=sparse",), ()),
    "α starts at 0": (("alpha_init=0.0",), ()),
    "α starts at 1": (("alpha_init=1.0",), ()),
    "8 modes, 8 taps": (("modes=8", "taps=8"), ()),
    "32 modes, 32 taps": (("modes=32", "taps=32"), ()),
    "kernels' rate 0.05": ((), ("--kernel-lr-scale", "0.05")),
    "kernels' rate 1": ((), ("--kernel-lr-scale", "1")),
}

# Images in one pass that take a model as long as 60,000 take ConvNeXt, as experiments.speed measured it.
EQUAL_TIME = {"paper's layer, batch": 35_500, "local taps, batch": 26_400, "local taps, parseval": 39_500}


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
    """

    group: str
    name: str
    seed: int
    data: str
    options: tuple[str, ...]
    start: Optional[str] = None

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
        return ":".join([args.model, *(f"{key}={value}" for key, value in args.model_kwargs.items())])


def model(spec: tuple[str, tuple[str, ...]], shape: tuple[str, ...] = SHAPE, *more: str) -> tuple[str, ...]:
    return ("--model", spec[0], "--model-kwargs", *shape, *spec[1], *more)


def fashion(spec: tuple[str, tuple[str, ...]], *more: str) -> tuple[str, ...]:
    return (*model(spec, SHAPE, *more), *RECIPE, *FASHION, "--img-size", "16")


def main_rows() -> list[Row]:
    """Returns the models from scratch on Fashion-MNIST, one pass over its 60,000 images."""
    return [
        Row("main", name, seed, "fashion-60000", fashion(spec)) for seed in range(3) for name, spec in MODELS.items()
    ]


def equal_time_rows() -> list[Row]:
    """Returns the same models on as many images as take the time of ConvNeXt's pass."""
    return [
        Row("equal time", name, seed, f"fashion-{images}", fashion(MODELS[name]))
        for seed in range(3)
        for name, images in EQUAL_TIME.items()
    ]


def change_rows() -> list[Row]:
    """Returns the layer with local taps and parseval norm with one thing changed."""
    return [
        Row("changes", name, 0, "fashion-60000", (*fashion(PARSEVAL, *arguments), *options))
        for name, (arguments, options) in CHANGES.items()
    ]


def fine_tuning_rows() -> list[Row]:
    """Returns ConvNeXts trained on half of the classes, then tuned on the other half: as they are, and converted."""
    rows = []
    tuned = "--img-size 16 --global-batch 64 --epochs 3 --warmup-epochs 0.1 --lr 1e-3 --scale 0.6 1".split()
    for seed in range(3):
        first = Row("before fine-tuning", "ConvNeXt", seed, "fashion-first-half", fashion(CONVNEXT))
        rows.append(first)
        for name in ("ConvNeXt", *NORMS):
            options = (*model(MODELS[name]), *RECIPE, *tuned)
            rows.append(Row("fine-tuning", name, seed, "fashion-second-half", options, first.identifier))
    return rows


def pathfinder_rows() -> list[Row]:
    """Returns the models on drawings in which two discs are joined by a curve or not, at two sizes."""
    rows = []
    for side, seeds, epochs in ((32, 3, 4), (48, 1, 2)):
        for seed in range(seeds):
            for name in MODELS:
                first = before_pathfinder_row(name, seed, side)
                rows += [first, pathfinder_row(f"pathfinder {side}", first, side, epochs)]
    return rows


def other_pathfinder_rows() -> list[Row]:
    """Returns the models that go on from the smaller drawings to the larger; ConvNeXts with more steps on either; and
    all models in smaller batches, soon warm, where the norms have more seeds than the others."""
    trained = [row for row in pathfinder_rows() if row.group == "pathfinder 32"]
    rows = [pathfinder_row("pathfinder 48, from 32", row, 48, 1, keeping=True) for row in trained]
    resampled = [row for row in trained if row.name in ("local taps, parseval", "local taps, kernel")]
    rows += [pathfinder_row("pathfinder 48, resampled", row, 48, 1) for row in resampled]
    rows += [pathfinder_row("pathfinder 48, 2 passes", row, 48, 2) for row in trained if row.name == "ConvNeXt"]
    for seed in range(3):
        first = before_pathfinder_row("ConvNeXt", seed, 32)
        rows.append(pathfinder_row("pathfinder 32, 6 passes", first, 32, 6))
    for seed in range(6):
        for name in MODELS if seed < 3 else NORMS:
            first = before_pathfinder_row(name, seed, 32)
            rows += [first, pathfinder_row("pathfinder 32, batch 32", first, 32, 2, batch=32, warmup=0.1)]
    return rows


def before_pathfinder_row(name: str, seed: int, side: int) -> Row:
    """Returns a pass over Fashion-MNIST at the drawings' size: in first trials none left chance from scratch."""
    options = (*model(MODELS[name], PATHFINDER_SHAPE), *RECIPE, *FASHION, "--img-size", str(side))
    return Row(f"before pathfinder {side}", name, seed, "fashion-27000", options)


def pathfinder_row(
    group: str, first: Row, side: int, epochs: int, batch: int = 64, warmup: float = 0.5, keeping: bool = False
) -> Row:
    recipe = f"--img-size {side} --global-batch {batch} --epochs {epochs} --lr 1e-3 --warmup-epochs {warmup}"
    recipe += " --scale 0.99 1 --crop-pct 1 --smoothing 0" + " --keep-kernels" * keeping
    options = (*model(MODELS[first.name], PATHFINDER_SHAPE), *RECIPE, *recipe.split())
    return Row(group, first.name, first.seed, f"pathfinder-{side}", options, first.identifier)


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
    for seed in range(3):
        for name, (spec, keeping) in GOING_ON.items():
            first = before_resolution_row(spec, seed)
            rows.append(first)
            for side in LARGER_SIDES:
                options = (*model(spec, PATHFINDER_SHAPE), *RECIPE, *tuned, "--img-size", str(side), *keeping)
                rows.append(Row(f"resolution {side}", name, seed, "fashion-10000", options, first.identifier))
    return rows


def before_resolution_row(spec: tuple[str, tuple[str, ...]], seed: int) -> Row:
    """Returns three passes over 20,000 images of Fashion-MNIST at 32 px."""
    name = next(name for name, own in MODELS.items() if own == spec)
    options = (*model(spec, PATHFINDER_SHAPE), *RECIPE, *FASHION, "--epochs", "3", "--img-size", "32")
    return Row("resolution 32", name, seed, "fashion-20000", options)


def all_rows() -> list[Row]:
    """Returns every row once."""
    rows = [*main_rows(), *fine_tuning_rows(), *pathfinder_rows(), *other_pathfinder_rows(), *change_rows()]
    return list(dict.fromkeys([*rows, *equal_time_rows(), *resolution_rows()]))
