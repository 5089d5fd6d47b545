"""Trains a small MRConvNeXt on real images of digits, deploys it and shows what became of it, in a few minutes.

python scripts/demo.py --output demo-output
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import Tensor, nn
from tqdm import tqdm

import mrconvnext
from mrconvnext.norms import NORMS
from mrconvnext.plots import plot_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint and the picture")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the 1,347 images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--branch-norm", choices=NORMS, default="kernel", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and order (default: %(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    train_images, test_images, train_labels, test_labels = load_images(64)
    model: Any = timm.create_model(
        "mrconvnext_atto",
        depths=(1, 1, 2, 1),
        dims=(24, 48, 96, 192),
        in_chans=1,
        num_classes=10,
        img_size=64,
        branch_norm=args.branch_norm,
        ls_init_value=0.5,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters / 1e6:.2f}M parameters, {len(train_images)} images of 64×64 to train, {len(test_images)} held out"
    )

    start = time.perf_counter()
    train(model, train_images, train_labels, args)
    print(f"trained in {time.perf_counter() - start:.0f} s")

    model.eval()
    logits = predict(model, test_images)
    print(f"held-out accuracy: {accuracy(logits, test_labels):.1%}")
    print(f"  with every α zero, local taps alone: {accuracy_without_branches(model, test_images, test_labels):.1%}")

    deployed = reparameterize_model(model)
    deployed_logits = predict(deployed, test_images)
    same = (deployed_logits.argmax(1) == logits.argmax(1)).sum().item()
    difference = (deployed_logits - logits).abs().max().item()
    print(f"deployed: one kernel a layer; {same} of {len(logits)} predictions the same,")
    print(f"  logits differ by at most {difference:.1e}, the largest is {logits.abs().max().item():.1f}")
    same, count = agreement_in_bfloat16(deployed, torch.cat([train_images, test_images]))
    print(f"  under bfloat16 autocast {same} of all {count} predictions are the same as in float32")
    training_ms, deployed_ms = time_models([model, deployed], test_images[:64])
    print(f"  64 images take {deployed_ms:.0f} ms, in training form {training_ms:.0f} ms")

    checkpoint, picture = args.output / "mrconvnext_digits.safetensors", args.output / "kernels.png"
    save_file({name: value.contiguous() for name, value in deployed.state_dict().items()}, checkpoint)
    plot_kernels(model).savefig(picture, dpi=120)
    print(f"wrote {checkpoint} (deployed form) and {picture} (branches and merged kernels)")


def load_images(size: int) -> list[Tensor]:
    """Returns images (N, 1, size, size) to train and to test, and their labels: a quarter is held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(digits.target)
    return train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)


def train(model: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> None:
    steps = len(images) // args.batch_size
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps * args.epochs)
    terminal = sys.stderr.isatty()
    model.train()
    for epoch in range(args.epochs):
        order = torch.randperm(len(images))[: steps * args.batch_size].split(args.batch_size)
        losses = []
        for batch in tqdm(order, desc=f"epoch {epoch + 1}/{args.epochs}", disable=not terminal):
            loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        if not terminal:
            print(f"epoch {epoch + 1}/{args.epochs}: training loss {statistics.mean(losses):.3f}", flush=True)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(64)])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()


@torch.no_grad()
def accuracy_without_branches(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the accuracy with every α zero, and leaves the model as it was."""
    alphas = [layer.alpha for layer in model.modules() if isinstance(layer, mrconvnext.MRConv2d)]
    trained = [alpha.clone() for alpha in alphas]
    for alpha in alphas:
        alpha.zero_()
    result = accuracy(predict(model, images), labels)
    for alpha, value in zip(alphas, trained):
        alpha.copy_(value)
    return result


def agreement_in_bfloat16(model: nn.Module, images: Tensor) -> tuple[int, int]:
    """Returns how many predictions bfloat16 autocast leaves the same, and of how many."""
    expected = predict(model, images).argmax(1)
    with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
        return int((predict(model, images).argmax(1) == expected).sum()), len(images)


def time_models(models: list[nn.Module], images: Tensor, rounds: int = 7) -> list[float]:
    """Returns the median time of a forward pass in ms for each model; they take turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 2):
        for model, own in zip(models, times):
            start = time.perf_counter()
            predict(model, images)
            own.append(1000 * (time.perf_counter() - start))
    return [statistics.median(own[2:]) for own in times]


if __name__ == "__main__":
    main()
