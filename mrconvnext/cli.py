"""The command ``mrconvnext``: checkpoints in, checkpoints out."""

import argparse
import copy
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_reader, create_transform, resolve_data_config
from timm.utils import ParseKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Grayscale

from .convert import without_branches
from .flops import count_flops
from .hub import (
    HTTP_ERROR,
    LIMIT,
    form_of,
    is_deployed,
    parity,
    push_to_hub,
    random_images,
    save,
)
from .mrconv import MRConv2d
from .mrconvnext import MRConvNeXt
from .source import SOURCE, load
from .training.arguments import natural, positive
from .training.datasets import class_folders, classes_of, has_split, with_classes
from .training.errors import UserError
from .training.evaluation import evaluate as evaluated
from .training.loaders import EvalBatches
from .training.precision import Precision
from .training.processes import Processes
from .training.samples import FORMATS, Samples, UnreadableFiles, as_rgb


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which says of each try that it failed
    parser = make_parser()
    try:
        args = parser.parse_args(arguments)
    except ValueError:
        parser.error("--model-kwargs must be given as NAME=VALUE")
    try:
        return args.run(args)
    except (HTTP_ERROR, OSError, RuntimeError, TypeError, UserError, ValueError) as error:
        print(f"mrconvnext {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mrconvnext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {SOURCE}")
        own.set_defaults(run=run)
        own.add_argument("source", metavar="SOURCE", help="the checkpoint, see above")
        own.add_argument("--model", metavar="NAME", help="what a checkpoint file is of: mrconvnext_tiny, …")
        own.add_argument(
            *("--model-kwargs", "-k"),
            nargs="*",
            default={},
            action=ParseKwargs,
            metavar="NAME=VALUE",
            help="arguments of timm.create_model, such as img_size=384 (default: none)",
        )
        return own

    own = command("convert", convert, "write a ConvNeXt's checkpoint, or ours, as an MRConvNeXt in the form it has")
    own.add_argument("folder", metavar="FOLDER", type=Path, help="where to write")

    own = command("fuse", fuse, "write the deployed form of a checkpoint: one kernel a layer, in float32")
    own.add_argument("folder", metavar="FOLDER", type=Path, help="where to write")
    own.add_argument("--images", metavar="FOLDER", help="images to compare both forms on as well (default: none)")
    own.add_argument("--max-images", type=positive, default=16, help="number of them that are taken (default: 16)")
    own.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="largest difference of the logits and of a layer's output, as a fraction of the largest value "
        "(default: %(default)s)",
    )

    own = command("push", push, "upload a checkpoint to the Hub, as the user that is logged in there")
    own.add_argument("repo_id", metavar="REPO_ID", help="organisation/name; made if it is not there")
    own.add_argument("--fused", action="store_true", help="upload the deployed form (default: the form it has)")
    own.add_argument("--license", help="licence of the weights (default: that of the weights it was made with)")
    own.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    own.add_argument("--revision", help="branch (default: the main one)")
    own.add_argument("--commit-message", default="Add model", help="(default: %(default)s)")

    own = command("evaluate", evaluate, "print loss and accuracy on images in class folders")
    own.add_argument("--data-dir", metavar="FOLDER", type=Path, required=True, help="folder of splits, or of classes")
    own.add_argument("--split", help="which of the folder's splits (default: validation, or all images without splits)")
    own.add_argument("--batch-size", "-b", type=positive, default=32, help="images at once (default: %(default)s)")
    own.add_argument("--workers", "-j", type=natural, default=2, help="processes that read images (default: 2)")

    text = "draw a checkpoint's kernels, their weights and what each stage sees, as pictures and as a page, index.html"
    own = command("plot", plot, f"{text}, beside the plain ConvNeXt")
    own.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="where to write pictures and page")
    own.add_argument("--images", metavar="FOLDER", help="images that gradients are taken on (default: random ones)")
    own.add_argument("--max-images", type=positive, default=8, help="number of them that are taken (default: 8)")

    own = command("onnx", to_onnx, "write the deployed form as an ONNX file, for one size of images and any batch")
    own.add_argument("file", metavar="FILE", type=Path, help="where to write")

    own = command("classify", classify, "print the most probable classes of images")
    own.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="files")
    own.add_argument("--top", type=positive, default=5, help="number of classes (default: %(default)s)")

    command("info", info, "print a checkpoint's form, kernels, grid, parameters and GFLOPs")
    return parser


def convert(args: argparse.Namespace) -> int:
    model = load(args)
    save(model, args.folder)
    print(f"{form_of(model)} written to {args.folder}")
    return 0


def fuse(args: argparse.Namespace) -> int:
    model = load(args)
    fused = copy.deepcopy(model).reparameterize()
    compared = {"random images": random_images(model)}
    if args.images is not None:
        compared[f"images of {args.images}"] = real_images(model, args.images, args.max_images)
    for name, images in compared.items():
        found = parity(model, fused, images)
        print(f"parity error on {len(images)} {name}: {found}")
        if not found.within(args.limit):
            raise ValueError(f"the parity error is above --limit {args.limit}: nothing is written")
    save(model, args.folder, fused=True, limit=args.limit)
    print(f"deployed form written to {args.folder}")
    return 0


def real_images(model: MRConvNeXt, folder: str, count: int) -> Tensor:
    """Returns images (B, C, H, W) of a folder as the model takes them in evaluation; broken ones are skipped."""
    if not Path(folder).is_dir():
        raise ValueError(f"--images {folder} is not a folder")
    images: list[Tensor] = []
    errors: list[str] = []
    for file in image_files(folder):
        try:
            images.append(as_taken(model, Path(file)))
        except ValueError as error:
            errors.append(str(error))
        if len(images) == count:
            break
    if not images:
        raise ValueError(f"--images {folder} holds no image that can be read, such as {errors[0]}")
    if errors:
        print(f"--images {folder}: {len(errors)} files are skipped, such as {errors[0]}", file=sys.stderr)
    return torch.stack(images)


def as_taken(model: MRConvNeXt, file: Path) -> Tensor:
    """Returns an image of a file (C, H, W) as the model takes it in evaluation; a ValueError if it is broken."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            own = as_rgb(image)
    except Exception as error:  # Pillow's readers raise whatever damaged files make them raise
        raise ValueError(f"{file} can't be read ({error})") from error
    return transform_of(model)(own)


def transform_of(model: MRConvNeXt) -> Callable[[Image.Image], Tensor]:
    """Returns what makes of an image in RGB what a model takes in evaluation."""
    own = create_transform(**resolve_data_config(model=model))
    return Compose([Grayscale(), own]) if model.stem[0].in_channels == 1 else own


def image_files(folder: str) -> list[str]:
    try:
        return create_reader("", root=folder).filenames(absolute=True)
    except RuntimeError as error:
        raise ValueError(f"--images {folder} holds no images: {error}") from error


def push(args: argparse.Namespace) -> int:
    print(
        push_to_hub(
            load(args),
            args.repo_id,
            fused=args.fused,
            license=args.license,
            private=args.private,
            revision=args.revision,
            commit_message=args.commit_message,
        )
    )
    return 0


@torch.no_grad()
def classify(args: argparse.Namespace) -> int:
    model = load(args)
    names = model.pretrained_cfg.get("label_names") or [f"class {i}" for i in range(model.num_classes)]
    folders = [file for file in args.images if file.is_dir()]
    if folders:
        raise ValueError(f"{folders[0]} is a folder: give files")
    for file in args.images:
        shares, classes = model(as_taken(model, file)[None]).softmax(-1)[0].topk(min(args.top, model.num_classes))
        found = ", ".join(f"{names[i]} {100 * share:.1f} %" for share, i in zip(shares.tolist(), classes.tolist()))
        print(f"{file}: {found}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    model = load(args)
    if not args.data_dir.is_dir():
        raise ValueError(f"--data-dir {args.data_dir} is not a folder")
    dataset = with_classes(class_folders(args.data_dir, split_of(args)), args.data_dir)
    names, known = classes_of(dataset), model.pretrained_cfg.get("label_names")
    if names is None or len(names) != model.num_classes or (known and list(known) != names):
        raise ValueError(
            f"--data-dir {args.data_dir} has the classes {', '.join(names or ['none'])}, and the model "
            f"{', '.join(known or [str(model.num_classes)])}"
        )
    samples = Samples(dataset, transform_of(model), seed=0, train=False)
    batches = EvalBatches(len(samples), args.batch_size, rank=0, processes=1)
    loader = DataLoader(samples, batch_sampler=batches, num_workers=args.workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = Precision(device, torch.float32, None, torch.contiguous_format)
    unreadable = UnreadableFiles(limit=len(samples))
    found = evaluated(precision.model(model), loader, precision, Processes(0, 1, device), unreadable)
    print(f"{len(samples)} images of {args.data_dir}: " + ", ".join(f"{name} {own:.6g}" for name, own in found.items()))
    return 0


def split_of(args: argparse.Namespace) -> str:
    """Returns which split of --data-dir is evaluated on, an empty name if it has none."""
    if args.split is not None:
        return args.split
    found = [split for split in ("train", "validation", "test") if has_split(args.data_dir, split)]
    if found and "validation" not in found:
        raise ValueError(f"--data-dir {args.data_dir} has no validation split: give --split {' or '.join(found)}")
    return "validation" if found else ""


def to_onnx(args: argparse.Namespace) -> int:
    try:
        from timm.utils.onnx import onnx_export
    except ImportError as error:
        raise ValueError(f'onnx needs more libraries ({error}): pip install "mrconvnext[onnx]"') from error
    model = load(args).reparameterize()
    size = (model.stem[0].in_channels, *model.pretrained_cfg["input_size"][1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        onnx_export(model=model, output_file=str(args.file), batch_size=2, input_size=size)
    images = f"(any batch, {', '.join(map(str, size))})"
    print(f"{args.file}: images input0 {images}, logits output0 (any batch, {model.num_classes})")
    return 0


def plot(args: argparse.Namespace) -> int:
    try:
        from . import page, plots
    except ImportError as error:
        raise ValueError(f'plot needs matplotlib ({error}): pip install "mrconvnext[plots]"') from error
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is not a folder")
    model = load(args)
    images = random_images(model) if args.images is None else real_images(model, args.images, args.max_images)
    figures = {"kernels": plots.plot_kernels(model)}
    if not is_deployed(model):
        figures["alpha"] = plots.plot_alpha_norms(model)
    kind = "random image" if args.images is None else "image"
    taken_on = f"{len(images)} {kind}{'s' if len(images) > 1 else ''}"
    plain = without_branches(model)
    fields = [plots.receptive_fields(own, images) for own in (model, plain)]
    figures["receptive-fields"] = plots.draw_receptive_fields({model.pretrained_cfg["architecture"]: fields[0]})
    figures["receptive-fields"].suptitle(f"on {taken_on}", fontsize="small")
    text = page.make_page(model, plain, fields, args.source, taken_on)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.output / f"{name}.png", dpi=110)
        print(args.output / f"{name}.png")
    (args.output / "index.html").write_bytes(text.encode("utf-8", errors="replace"))
    print(args.output / "index.html")
    return 0


def info(args: argparse.Namespace) -> int:
    model = load(args)
    cfg = model.pretrained_cfg
    flops = count_flops(model, cfg["input_size"])
    lines = {
        "architecture": cfg["architecture"],
        "form": form_of(model),
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M",
        "GFLOPs": f"{flops.per_image / 1e9:.2f} an image of {cfg['input_size'][1]}×{cfg['input_size'][2]}",
        "classes": model.num_classes,
        "licence": cfg.get("license"),
    }
    for i, stage in enumerate(model.stages):
        lines[f"stage {i + 1}"] = f"{len(stage.blocks)} blocks, {describe(stage.blocks[0].conv_dw)}"
    print("\n".join(f"{name:13} {value}" for name, value in lines.items()))
    return 0


def describe(layer: MRConv2d) -> str:
    """Returns what a layer's kernels are, in words."""
    height, width = layer.reference_grid
    grid = f"grid {height}×{width}, guard {layer.guard}" + (
        f", kernels made for {layer.made_for[0]}×{layer.made_for[1]}" if layer.is_resampled else ""
    )
    if layer.kernel is not None:
        return f"{layer.channels} channels, {grid}, one kernel of {layer.kernel.shape[1]} lags"
    options = layer.options
    directions = "two directions" if options.bidirectional else "one direction"
    lengths = ", ".join(str(length) for length in layer.branch_lengths)
    return (
        f"{layer.channels} channels, {grid}, {options.kernel} kernels of {lengths} positions in {directions}, "
        f"norm {options.norm}, local taps {layer.kernel_size}×{layer.kernel_size}"
    )


if __name__ == "__main__":
    sys.exit(main())
