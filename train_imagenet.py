"""Trains an MRConvNeXt, or any model of timm, on images: ImageNet with ConvNeXt's recipe by default.

    python train_imagenet.py --data-dir imagenet --model mrconvnext_tiny --output run          one process
    torchrun --nproc-per-node 8 train_imagenet.py --data-dir imagenet --output run             eight
    python train_imagenet.py --data-dir imagenet --output run --resume auto                    go on
    python train_imagenet.py --data-dir imagenet --output run --evaluate                       its best weights

The folder --output holds one run: args.yaml, summary.csv, curves.png, checkpoints (last.safetensors,
previous.safetensors), the best weights (best.safetensors) and, at the end, these ready for the Hub in both forms
(trained/, fused/). SIGTERM and SIGINT finish the step, save, and exit with status 75.
"""

import argparse
import contextlib
import copy
import csv
import importlib.util
import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

import timm
import torch
import torch.distributed as dist
import yaml
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, distribute_bn, freeze
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

import mrconvnext
from mrconvnext import MRConvNeXt, checkpoint
from mrconvnext.convert import options_of_file
from mrconvnext.data import NONE, EvalBatches, Samples, TrainBatches, classes_of, derived_seed, open_dataset, seed_all

_logger = logging.getLogger("train")

INTERRUPTED = 75

# ConvNeXt's rates of stochastic depth on ImageNet-1k; small sizes, of which the paper has none, as timm's recipes.
DROP_PATH = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5, "huge": 0.5}

# Arguments that a run may change when it goes on.
CHANGEABLE = {"resume", "output", "epochs", "workers", "device", "log_interval", "checkpoint_interval", "evaluate"}


class Refused(Exception):
    """What a user asked for can't be done; the message says what and where, in one line."""


# Arguments


class Keywords(ParseKwargs):
    """Reads NAME=VALUE and refuses what is not."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: list[str], option: Any = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option} must be NAME=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option)


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def part(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def parse_args(argv: Optional[list[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="", help='"digits", or a name of timm: torch/…, hfds/…, wds/… (default: class folders)')
    add("--data-dir", type=Path, help="folder with a folder, or a tar file, for each split")
    add("--train-split", default="train", help="(default: %(default)s)")
    add("--val-split", default="validation", help="(default: %(default)s)")
    add("--dataset-download", action="store_true", help="let the dataset download itself (default: no)")
    add("--num-classes", type=positive, help="classes (default: those of the data)")
    add("--img-size", type=positive, help="side of the images, pixels (default: the model's, 32 for digits)")
    add("--crop-pct", type=part, help="part of an image's side that is evaluated, 0 to 1 (default: the model's)")
    workers = min(4, os.cpu_count() or 1)
    add("--workers", "-j", type=natural, default=workers, help="processes that read images (default: 4, or the cores)")
    add("--max-unreadable", type=natural, default=100, help="files that may be passed over in an epoch (default: 100)")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="mrconvnext_tiny", help="name of a model of timm (default: %(default)s)")
    add("--model-kwargs", nargs="*", default={}, action=Keywords, metavar="NAME=VALUE", help="its arguments")
    add("--pretrained", action="store_true", help="start from published weights (default: from none)")
    add("--finetune", type=Path, metavar="FILE", help="start from a file's weights: ours or a ConvNeXt's")
    add("--freeze", nargs="*", default=[], metavar="MODULE", help="modules that stay as they are: stem, stages.0, …")
    add("--drop-path", type=part, help="rate of stochastic depth (default: 0.1, small 0.4, base and large 0.5)")
    add("--ls-init", type=float, help="start of the layer scales (default: 1e-6)")
    add("--grad-checkpointing", action="store_true", help="compute blocks again instead of keeping them")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive, default=300, help="(default: %(default)s)")
    add(
        "--global-batch",
        type=positive,
        default=4096,
        help="images of a step, over all processes (default: %(default)s)",
    )
    add(
        "--batch-size",
        "-b",
        type=positive,
        help="images at once in a process (default: at most 128 that divide its share)",
    )
    add("--opt", default="adamw", help="optimizer, by timm's name (default: %(default)s)")
    add("--opt-betas", type=float, nargs=2, help="its betas (default: its own)")
    add("--lr", type=float, default=4e-3, help="learning rate for a global batch of 4096 (default: %(default)s)")
    add("--no-lr-scaling", action="store_true", help="take --lr as it is, not times global batch / 4096")
    add("--kernel-lr-scale", type=float, default=0.25, help="factor of the kernels' rate (default: %(default)s)")
    add("--weight-decay", type=float, default=0.05, help="of all but kernels, norms, biases (default: %(default)s)")
    add("--layer-decay", type=float, help="factor of the learning rate from layer to layer (default: none)")
    add("--clip-grad", type=float, help="largest norm of the gradient (default: none)")
    add("--warmup-epochs", type=float, default=20, help="(default: %(default)s)")
    add("--warmup-lr", type=float, default=0.0, help="learning rate at the start (default: %(default)s)")
    add("--min-lr", type=float, default=1e-6, help="learning rate at the end (default: %(default)s)")
    add("--model-ema-decay", type=part, default=0.9999, help="of the averaged weights, 0 for none (default: 0.9999)")
    add("--sync-norm", action="store_true", help="branch statistics over all processes (default: each its own)")

    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action="store_true", help="resize alone, no flips, mixup, cutmix or smoothing")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment, as timm writes it (default: %(default)s)")
    add("--scale", type=part, nargs=2, default=(0.08, 1.0), help="part of an image that is cropped (default: 0.08 1)")
    add("--hflip", type=part, default=0.5, help="probability of a flip (default: %(default)s)")
    add("--reprob", type=part, default=0.25, help="probability of random erasing (default: %(default)s)")
    add("--mixup", type=float, default=0.8, help="alpha of mixup (default: %(default)s)")
    add("--cutmix", type=float, default=1.0, help="alpha of cutmix (default: %(default)s)")
    add("--smoothing", type=part, default=0.1, help="label smoothing (default: %(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, required=True, help="folder of the run")
    add("--resume", default="", choices=("", "auto"), help='"auto": go on from the newest complete checkpoint, if any')
    add(
        "--evaluate",
        action="store_true",
        help="evaluate the run's best weights, or those given, as they are and deployed",
    )
    add("--seed", type=natural, default=42, help="(default: %(default)s)")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="(default: %(default)s)",
    )
    add("--model-dtype", default="float32", choices=("float32", "float64"), help="(default: %(default)s)")
    add("--amp-dtype", choices=("bfloat16", "float16"), help="autocast to this type (default: none)")
    add("--channels-last", action="store_true", help="images in channels-last order")
    add("--torchcompile", action="store_true", help="compile the model")
    add("--log-interval", type=positive, default=50, help="steps between two lines (default: %(default)s)")
    add("--checkpoint-interval", type=positive, default=500, help="steps between checkpoints (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.dataset == "digits" and args.img_size is None:
        args.img_size = 32
    if args.scale[0] > args.scale[1]:
        parser.error(f"--scale must be a range, got {args.scale[0]} {args.scale[1]}")
    if args.evaluate and not args.pretrained and args.finetune is None:
        args.finetune = args.output / "best.safetensors"
    return args


# Processes


class Processes(NamedTuple):
    """This process among those of ``torchrun``, or alone."""

    rank: int
    count: int
    device: torch.device

    def total(self, *values: float) -> list[float]:
        """Returns the sums of values over all processes."""
        if self.count == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()


@contextlib.contextmanager
def processes_of(device: str) -> Iterator[Processes]:
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: PyTorch finds no CUDA device")
    if "WORLD_SIZE" not in os.environ:
        yield Processes(0, 1, torch.device(device))
        return
    own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), own)
    finally:
        dist.destroy_process_group()


# Batches


def split_batch(args: argparse.Namespace, processes: int) -> int:
    """Returns the images at once in a process: a step takes ``--global-batch``, each process an equal share of it."""
    share, rest = divmod(args.global_batch, processes)
    if rest or share == 0:
        raise Refused(f"--global-batch {args.global_batch} can't be split over {processes} processes")
    unit = 2 if is_mixed(args) else 1  # mixup takes images in pairs
    if share % unit:
        raise Refused(f"--global-batch {args.global_batch}: mixup needs an even number of images in a process")
    size = args.batch_size or max(size for size in range(unit, min(share, 128) + 1, unit) if share % size == 0)
    if share % size or size % unit:
        raise Refused(
            f"--batch-size {size} must {'be even for mixup and ' if unit == 2 else ''}divide a process's share {share} "
            f"of --global-batch {args.global_batch}"
        )
    return size


def is_mixed(args: argparse.Namespace) -> bool:
    return not args.no_aug and (args.mixup > 0 or args.cutmix > 0)


class Data(NamedTuple):
    train: Dataset
    validation: Dataset
    classes: int


def open_data(args: argparse.Namespace) -> Data:
    """Returns the images of both splits, without transforms."""
    options = {"download": args.dataset_download}
    if args.dataset.startswith(("wds/", "hfids/", "tfds/")):
        options |= {"batch_size": args.batch_size or 1, "seed": args.seed}
    elif args.dataset == "":
        options = {}
    try:
        train = open_dataset(args.dataset, args.data_dir, args.train_split, True, **options)
        validation = open_dataset(args.dataset, args.data_dir, args.val_split, False, **options)
    except ValueError as error:
        raise Refused(str(error)) from error
    names, others = classes_of(train), classes_of(validation)
    if names != others:
        different = sorted(set(names or ()) ^ set(others or ()))
        raise Refused(f"the classes of {args.train_split} and {args.val_split} differ: {', '.join(different[:5])}")
    if names is not None and len(names) < 2:
        raise Refused(f"--data-dir {args.data_dir} has one class only: {names[0]}")
    if names is None and args.num_classes is None:
        raise Refused(f"--dataset {args.dataset} does not say its classes: give --num-classes")
    if names is not None and args.num_classes not in (None, len(names)):
        raise Refused(f"--num-classes {args.num_classes} and the data's {len(names)} classes disagree")
    return Data(train, validation, args.num_classes or len(names))


class Loaders(NamedTuple):
    train: DataLoader
    validation: DataLoader
    steps: int  # of an epoch

    def epoch(self, number: int, first: int) -> Iterator:
        """Returns the batches of an epoch from a step on; a stream has no such order and starts anew."""
        if isinstance(self.train.batch_sampler, TrainBatches):
            self.train.batch_sampler.start(number, first)
        else:
            self.train.dataset.set_epoch(number)
        return iter(self.train)


def make_loaders(data: Data, args: argparse.Namespace, config: dict, processes: Processes) -> Loaders:
    size = split_batch(args, processes.count)
    train, validation = make_transforms(args, config)
    options = {
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "pin_memory": processes.device.type == "cuda",
        "worker_init_fn": ignore_signals,
    }
    if isinstance(data.train, IterableDataset):
        data.train.transform, data.validation.transform = train, validation
        for dataset in (data.train, data.validation):
            dataset.set_loader_cfg(num_workers=args.workers)
        loaders = [DataLoader(dataset, batch_size=size, **options) for dataset in (data.train, data.validation)]
        return Loaders(*loaders, len(data.train) * processes.count // args.global_batch)  # timm's length is a share
    batches = TrainBatches(len(data.train), args.global_batch, size, args.seed, processes.rank, processes.count)
    if batches.steps == 0:
        raise Refused(f"--global-batch {args.global_batch} is more than the {len(data.train)} training images")
    evaluated = EvalBatches(len(data.validation), size, processes.rank, processes.count)
    return Loaders(
        DataLoader(Samples(data.train, train, args.seed, train=True), batch_sampler=batches, **options),
        DataLoader(Samples(data.validation, validation, args.seed, train=False), batch_sampler=evaluated, **options),
        batches.steps,
    )


def ignore_signals(worker: int) -> None:
    """Leaves signals that are sent to a group of processes to the one that trains, which ends the others."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def ending_workers() -> Iterator[None]:
    """Ends the processes that read images, which ignore signals, however the run ends."""
    try:
        yield
    finally:
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's takes their end for a failure
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        signal.signal(signal.SIGCHLD, handler)


def make_transforms(args: argparse.Namespace, config: dict[str, Any]) -> tuple[Callable, Callable]:
    """Returns timm's transforms of images for training and for evaluation."""
    common = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    augmentation = dict(scale=args.scale, hflip=args.hflip, auto_augment=args.aa or None, re_prob=args.reprob)
    try:
        train = create_transform(**common, is_training=True, no_aug=args.no_aug, re_mode="pixel", **augmentation)
    except (AssertionError, KeyError, ValueError) as error:
        raise Refused(f"--aa must be an augmentation that timm knows, got {args.aa!r} ({error})") from error
    return train, create_transform(**common, crop_pct=config["crop_pct"])


# Model


def make_model(args: argparse.Namespace, classes: int) -> nn.Module:
    options = {
        "num_classes": classes,
        "drop_path_rate": drop_path(args),
        "ls_init_value": args.ls_init,
        **args.model_kwargs,
    }
    if args.sync_norm:
        options |= {"branch_norm": "parseval", "sync_norm": True}
    try:
        if args.finetune:
            found = options_of_file(args.finetune, timm.get_pretrained_cfg_value(args.model, "classifier"))
            options["pretrained_cfg_overlay"] = {"file": str(args.finetune), "num_classes": found.pop("num_classes")}
            options = {**found, **options}
        if args.img_size and timm.models.is_model_in_modules(args.model, ["mrconvnext"]):
            options.setdefault("img_size", args.img_size)
        model = timm.create_model(args.model, pretrained=args.pretrained or args.finetune is not None, **options)
        model.set_grad_checkpointing(args.grad_checkpointing)
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError, OSError) as error:
        raise Refused(" ".join(f"--model {args.model}: {error}".split())) from error
    for name in args.freeze:
        if name not in dict(model.named_modules()):
            raise Refused(
                f"--freeze {name}: {args.model} has no such module, but {', '.join(dict(model.named_children()))}"
            )
        freeze(model, name, include_bn_running_stats=False)  # their statistics stay since they stay in eval mode
    return model.to(getattr(torch, args.model_dtype))


def drop_path(args: argparse.Namespace) -> Optional[float]:
    """Returns the rate of stochastic depth, None to leave a model that is no ConvNeXt as it is."""
    if args.drop_path is not None or not timm.models.is_model_in_modules(args.model, ["convnext", "mrconvnext"]):
        return args.drop_path
    return next((DROP_PATH[word] for word in args.model.partition(".")[0].split("_") if word in DROP_PATH), 0.1)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Returns an optimizer with timm's groups, in each of which the kernels are a group of their own."""
    no_decay = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decay = {"weight_decay": args.weight_decay, "no_weight_decay_list": no_decay}
    if args.layer_decay is None:
        groups = param_groups_weight_decay(model, **decay)
    else:
        groups = param_groups_layer_decay(model, **decay, layer_decay=args.layer_decay)
    kernels = {id(model.get_parameter(name)) for name in no_decay} if isinstance(model, MRConvNeXt) else set()
    split = []
    for group in groups:
        for is_kernel, scale in ((False, 1.0), (True, args.kernel_lr_scale)):
            own = [parameter for parameter in group["params"] if (id(parameter) in kernels) == is_kernel]
            if own:
                split.append({**group, "params": own, "lr_scale": scale * group.get("lr_scale", 1.0)})
    options = {"betas": tuple(args.opt_betas)} if args.opt_betas else {}
    try:
        rates = {"lr": learning_rate(args), "weight_decay": args.weight_decay}
        return create_optimizer_v2(split, opt=args.opt, **rates, **options)
    except (AssertionError, TypeError, ValueError) as error:
        raise Refused(f"--opt {args.opt}: {error}") from error


def learning_rate(args: argparse.Namespace) -> float:
    return args.lr if args.no_lr_scaling else args.lr * args.global_batch / 4096


# The run


class Run:
    """A model in training with all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        self.args, self.processes = args, processes
        seed_all(args.seed)
        data = open_data(args)
        self.classes = data.classes
        self.model = make_model(args, data.classes).to(processes.device)
        if args.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.config = self._data_config()
        self.loaders = make_loaders(data, args, self.config, processes)
        self.accumulation = args.global_batch // processes.count // split_batch(args, processes.count)
        self.optimizer = make_optimizer(self.model, args)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.loaders.steps,
        )
        averaged = {"decay": args.model_ema_decay, "use_warmup": True}
        self.ema = ModelEmaV3(self.model, **averaged) if args.model_ema_decay else None
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp_dtype == "float16")
        mixed = is_mixed(args)
        smoothing = 0.0 if args.no_aug else args.smoothing
        options = dict(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=smoothing)
        self.mixup = Mixup(num_classes=data.classes, **options) if mixed else None
        self.loss = SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(smoothing)
        self.trained = self.model
        if processes.count > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            self.trained = DistributedDataParallel(self.model, device_ids=devices)
        if args.torchcompile:
            self.trained = torch.compile(self.trained)
        # What a checkpoint holds beside tensors.
        self.step, self.losses, self.best, self.rows = 0, [], -math.inf, []
        self.unreadable: list[str] = []  # files of this epoch
        self.signalled = self.stop = False  # this process was told to stop; all processes know

    def _data_config(self) -> dict[str, Any]:
        side = self.args.img_size
        given = {"crop_pct": self.args.crop_pct, "input_size": (3, side, side) if side else None}
        return resolve_data_config({key: value for key, value in given.items() if value}, model=self.model)

    # Checkpoints

    def save(self) -> None:
        """Writes a checkpoint, after which nothing of the run depends on anything else: seeds follow from the step."""
        if self.processes.rank != 0:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": value for name, value in self.ema.module.state_dict().items()}
        optimizer, rest = checkpoint.flatten_optimizer(self.optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.items()}
        state = {
            "step": self.step,
            "losses": self.losses,
            "best": self.best,
            "rows": self.rows,
            "unreadable": self.unreadable,
            "scaler": self.scaler.state_dict(),
            "optimizer": rest,
            "arguments": plain(self.args),
        }
        checkpoint.write_last(self.args.output, tensors, state)

    def restore(self) -> bool:
        """Goes on from the newest complete checkpoint; returns whether there is one."""
        try:
            found = checkpoint.read_newest(self.args.output)
        except ValueError as error:
            raise Refused(str(error)) from error
        if found is None:
            return False
        tensors, state = found
        check_same(self.args, state["arguments"])
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = value
        self.model.load_state_dict(parts["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(parts["ema"])
        checkpoint.restore_optimizer(self.optimizer, parts["optimizer"], state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.losses, self.best = state["step"], state["losses"], state["best"]
        self.rows = state["rows"]
        self.unreadable = state["unreadable"] if self.processes.rank == 0 else []
        return True

    # Training

    def train(self) -> None:
        """Trains to the last epoch, or until a signal."""
        if self.processes.rank == 0:
            self.tensorboard = open_tensorboard(self.args.output, self.step // self.loaders.steps)
        while len(self.rows) < self.args.epochs:
            epoch = len(self.rows)
            first = self.step - epoch * self.loaders.steps
            if first < self.loaders.steps:
                self.train_epoch(epoch, first)
            if self.stop:
                return
            self.finish_epoch(epoch)

    def note_signal(self) -> None:
        """Lets the run stop after the step that it is at."""
        self.signalled = True

    def train_epoch(self, epoch: int, first: int) -> None:
        """Trains an epoch from a step on, to its end or until a signal."""
        if first and isinstance(self.loaders.train.dataset, IterableDataset):
            _logger.info(f"epoch {epoch}: a stream can't go on in its middle, the epoch starts anew")
            self.step, self.losses, first = epoch * self.loaders.steps, [], 0
        batches = self.loaders.epoch(epoch, first)
        clock = Clock(self.processes.device)
        hidden = self.processes.rank != 0 or not sys.stderr.isatty()
        for number in tqdm(range(first, self.loaders.steps), f"epoch {epoch}", leave=False, disable=hidden):
            self.losses.append(self.train_step(batches, clock))
            self.step += 1
            ended = number == self.loaders.steps - 1
            if ended or (number + 1) % self.args.log_interval == 0:
                self.log_step(epoch, number, clock)
            (signalled,) = self.processes.total(float(self.signalled))
            self.stop = signalled > 0
            if ended or self.stop or self.step % self.args.checkpoint_interval == 0:
                self.save()
            if self.stop:
                return

    def train_step(self, batches: Iterator, clock: "Clock") -> float:
        """Takes a step of the optimizer; returns the loss over the global batch."""
        self.trained.train()
        for name in self.args.freeze:
            self.model.get_submodule(name).eval()
        total = 0.0
        for i in range(self.accumulation):
            clock.start()
            images, targets, *unreadable = next(batches)
            self.count_unreadable(unreadable)
            # Of mixup, dropout and drop path.
            seed_all(derived_seed(self.args.seed, self.step, i, self.processes.rank))
            images, targets = self.to_device(images), targets.to(self.processes.device)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            clock.lap("data")
            last = i == self.accumulation - 1
            waiting = contextlib.nullcontext() if last or self.processes.count == 1 else self.trained.no_sync()
            with waiting:
                with self.autocast():
                    loss = self.loss(self.trained(images), targets) / self.accumulation
                clock.lap("forward")
                self.scaler.scale(loss).backward()
                clock.lap("backward")
            total += loss.item()
        (total,) = self.processes.total(total / self.processes.count)
        if not math.isfinite(total):
            raise Refused(f"the loss of step {self.step} is {total}; {last_good(self.args.output, self.step)}")
        if self.args.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.scheduler.step_update(self.step + 1)
        if self.ema is not None:
            self.ema.update(self.model, self.step + 1)
        clock.lap("step")
        self.check_unreadable()
        return total

    def to_device(self, images: Tensor) -> Tensor:
        dtype = getattr(torch, self.args.model_dtype)
        order = torch.channels_last if self.args.channels_last else torch.contiguous_format
        return images.to(self.processes.device, dtype, non_blocking=True, memory_format=order)

    def autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.args.amp_dtype or "bfloat16")
        return torch.autocast(self.processes.device.type, dtype, enabled=self.args.amp_dtype is not None)

    def count_unreadable(self, lists: list[list[str]]) -> None:
        """Names the files of an epoch that could not be read, each once."""
        for line in (line for names in lists for name in names for line in name.splitlines()):
            if line not in self.unreadable:
                self.unreadable.append(line)
                _logger.warning(f"passed over {line}")

    def check_unreadable(self) -> None:
        """Raises in all processes if there were too many files that could not be read."""
        (count,) = self.processes.total(len(self.unreadable))
        if count > self.args.max_unreadable:
            last = f", the last one {self.unreadable[-1]}" if self.unreadable else ""
            raise Refused(
                f"more than --max-unreadable {self.args.max_unreadable} files of an epoch can't be read{last}"
            )

    # After an epoch

    def finish_epoch(self, epoch: int) -> None:
        """Evaluates the model and the averaged one, and saves what they are."""
        if self.processes.count > 1:
            for own in (self.model, self.ema and self.ema.module):
                if own is not None:
                    distribute_bn(own, world_size=self.processes.count)  # all evaluate what the first process saves
        row = {"epoch": epoch, "lr": self.rate()}
        row["train_loss"] = sum(self.losses) / len(self.losses)
        row |= self.evaluate(self.model)
        best, module = row["top1"], self.model
        if self.ema is not None:
            row |= {f"ema_{name}": value for name, value in self.evaluate(self.ema.module).items()}
            if row["ema_top1"] >= best:
                best, module = row["ema_top1"], self.ema.module
        self.losses, self.unreadable = [], []
        self.rows.append(row)
        is_best = best > self.best
        self.best = max(best, self.best)
        _logger.info(", ".join(f"{name} {value:.6g}" for name, value in row.items()))
        if self.processes.rank == 0:
            if is_best:
                checkpoint.write(self.args.output / "best.safetensors", module.state_dict(), row)
            write_summary(self.rows, self.args.output)  # before the checkpoint, after which no epoch may be missing
            self.save()
            if self.tensorboard is not None:
                for name, value in row.items():
                    self.tensorboard.add_scalar(name, value, epoch)
                self.tensorboard.flush()

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Returns loss and accuracies in % over all validation images."""
        model.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        for images, targets, *unreadable in self.loaders.validation:
            self.count_unreadable(unreadable)
            targets = targets.to(self.processes.device)
            with self.autocast():
                logits = model(self.to_device(images)).double()
            logits, targets = logits[targets != NONE], targets[targets != NONE]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            # Counts, where timm's `accuracy` has shares: of a batch without a readable image there are none.
            right = logits.topk(min(5, self.classes)).indices == targets[:, None]
            counts = [right[:, :1].sum().item(), right.sum().item(), len(targets)]
            sums += torch.tensor([loss.item(), *counts], dtype=torch.float64)
        self.check_unreadable()
        loss, top1, top5, count = self.processes.total(*sums.tolist())
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}

    def rate(self) -> float:
        """Returns the learning rate of a parameter whose rate is not scaled."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group["lr_scale"]

    def log_step(self, epoch: int, number: int, clock: "Clock") -> None:
        recent = self.losses[-self.args.log_interval :]
        loss = sum(recent) / len(recent)
        _logger.info(
            f"epoch {epoch} step {number + 1}/{self.loaders.steps} loss {loss:.4f} lr {self.rate():.2e} {clock}"
        )


@contextlib.contextmanager
def noting_signals(note: Callable[[], None]) -> Iterator[None]:
    """Lets SIGTERM and SIGINT do no more than call a function."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in handlers:
        signal.signal(number, lambda *_: note())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Clock:
    """Seconds that the parts of training steps took."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict.fromkeys(("data", "forward", "backward", "step"), 0.0)

    def start(self) -> None:
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def __str__(self) -> str:
        return " ".join(f"{part} {seconds:.1f}s" for part, seconds in self.seconds.items())


# Files


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """Returns arguments as YAML and JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def write_summary(rows: list[dict[str, float]], folder: Path) -> None:
    """Writes summary.csv, one line an epoch, and curves.png if matplotlib is there."""
    temporary = folder / ".summary.csv.writing"
    with open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, folder / "summary.csv")
    if importlib.util.find_spec("matplotlib") is None:
        return
    from mrconvnext.plots import plot_training

    plot_training(rows).savefig(folder / "curves.png", dpi=100)


def open_tensorboard(folder: Path, epoch: int) -> Any:
    """Returns a writer of TensorBoard's files that goes on from an epoch, None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=epoch)


def last_good(folder: Path, step: int) -> str:
    """Returns which checkpoint of a run is the last one whose weights took a step, if there is one."""
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found = checkpoint.read(folder / name)[1]["step"]
            if found < step:
                return f"the last good checkpoint is {folder / name}, of step {found}"
    return f"there is no good checkpoint in {folder}"


def check_output(args: argparse.Namespace) -> None:
    """Raises if the folder of a run holds another one."""
    names = ("args.yaml", checkpoint.LAST, checkpoint.PREVIOUS)
    if not args.resume and any((args.output / name).exists() for name in names):
        raise Refused(f"--output {args.output} holds another run: give --resume auto, or another folder")
    file = args.output / "args.yaml"
    if file.is_file():
        check_same(args, yaml.safe_load(file.read_text()) or {})


def check_same(args: argparse.Namespace, there: dict[str, Any]) -> None:
    """Raises if a run was begun with other arguments, but for those that may change."""
    own = json.loads(json.dumps(plain(args)))
    different = [name for name in own if name not in CHANGEABLE and there.get(name) != own[name]]
    if different:
        changes = ", ".join(f"--{name.replace('_', '-')} {there.get(name)}" for name in different)
        raise Refused(f"--output {args.output} holds another run, one with {changes}")


def write_args(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    temporary = args.output / ".args.yaml.writing"
    temporary.write_text(yaml.safe_dump(json.loads(json.dumps(plain(args)))))
    os.replace(temporary, args.output / "args.yaml")


def publish(run: Run) -> None:
    """Writes the best weights in both forms with their cards, ready for the Hub."""
    if not isinstance(run.model, MRConvNeXt):
        return
    try:
        weights, _ = checkpoint.read(run.args.output / "best.safetensors")
    except ValueError as error:
        raise Refused(str(error)) from error
    model = copy.deepcopy(run.model)
    model.load_state_dict(weights)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": run.config["input_size"]}
    metrics = {
        f"Top-1 (%), {run.args.val_split} images of {run.args.dataset or run.args.data_dir.name}": round(run.best, 2)
    }
    metrics["Epochs"] = len(run.rows)
    for fused in (False, True):
        folder = run.args.output / ("fused" if fused else "trained")
        found = mrconvnext.save(model, folder, fused=fused, metrics=metrics)
        _logger.info(f"{folder}: {found}")


def main(argv: Optional[list[str]] = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        with processes_of(args.device) as processes:
            if processes.rank != 0:
                logging.disable(logging.INFO)
            with ending_workers():
                return run(args, processes)
    except (Refused, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # of a process that reads images it comes with a traceback
        print(f"train_imagenet.py: {reason}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, processes: Processes) -> int:
    if args.evaluate:
        return evaluate(Run(args, processes))
    check_output(args)
    own = Run(args, processes)
    if args.resume and own.restore():
        _logger.info(f"goes on at step {own.step}")
    if processes.rank == 0:
        write_args(args)
    share = args.global_batch // processes.count
    _logger.info(
        f"{own.loaders.steps} steps an epoch of {args.global_batch} images: {processes.count} processes × "
        f"{own.accumulation} batches of {share // own.accumulation}"
    )
    with noting_signals(own.note_signal):
        own.train()
    if own.stop:
        _logger.info(f"stopped by a signal at step {own.step}; --resume auto goes on")
        return INTERRUPTED
    if processes.rank == 0:
        publish(own)
    return 0


def evaluate(own: Run) -> int:
    forms = {"as trained": own.model}
    if isinstance(own.model, MRConvNeXt):
        forms["deployed"] = copy.deepcopy(own.model).reparameterize()
    for name, model in forms.items():
        _logger.info(f"{name}: " + ", ".join(f"{key} {value:.6g}" for key, value in own.evaluate(model).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
