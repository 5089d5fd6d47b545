"""Saving models and publishing them on the Hub: safetensors, config.json and a model card, as timm reads them."""

import contextlib
import copy
import difflib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import timm
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from timm.layers import to_2tuple
from timm.models import save_for_hf
from torch import Tensor, nn

from .card import card
from .mrconv import MRConv2d
from .mrconvnext import MRConvNeXt

# Largest parity error that a saved model may have. Rounding is a hundredth of it.
LIMIT = 1e-4

# What huggingface_hub raises where no answer comes, as well as what it raises for one that refuses: the base of
# HfHubHTTPError, which is httpx's HTTPError or httpx2's, by the version.
HTTP_ERROR: type[Exception] = next(
    (base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base.__name__ == "HTTPError"),
    HfHubHTTPError,
)


class Parity(NamedTuple):
    """Largest differences of one model from another on the same images, as fractions of the largest value.

    Attributes:
        logits: Of the outputs.
        layer: Of the worst layer's outputs, each layer given the same input.
        name: The worst layer's name.
    """

    logits: float
    layer: float
    name: str

    def within(self, limit: float) -> bool:
        """Returns whether both are at most ``limit``; a NaN never is."""
        return self.logits <= limit and self.layer <= limit

    def __str__(self) -> str:
        return f"logits {self.logits:.1e}, worst layer {self.layer:.1e} ({self.name})"


def save(
    model: MRConvNeXt,
    folder: Union[str, os.PathLike],
    *,
    fused: bool = False,
    metrics: Optional[dict[str, Any]] = None,
    model_args: Optional[dict[str, Any]] = None,
    license: Optional[str] = None,
    images: Optional[Tensor] = None,
    limit: float = LIMIT,
    name: Optional[str] = None,
) -> Parity:
    """Writes a model's weights, config and card, for ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    What is written is read back and compared with the model before it takes the place of files in the folder.

    Args:
        model: Model in either form; it stays as it is.
        folder: Folder for ``model.safetensors``, ``config.json`` and ``README.md``.
        fused: Whether to write the deployed form, in float32.
        metrics: What was measured of it, by name, for the card.
        model_args: Arguments of ``timm.create_model`` that make such a model, beside those that are known: for models
            that `from_convnext` made of a ConvNeXt with arguments of its own.
        license: Licence of the weights, as the Hub names it. Default: that of the weights that the model was made
            with, if it is known; of others the card says that none is stated.
        images: Images (B, C, H, W) to compare on, as the model takes them. Default: two random ones.
        limit: Largest parity error of the logits and of any layer.
        name: What the card tells readers to give ``timm.create_model``. Default: ``local-dir:FOLDER``.

    Returns:
        How far the written model is from this one.

    Raises:
        TypeError: If ``model`` is not an MRConvNeXt.
        ValueError: If what would be written could not be read by timm, or is not this model within ``limit``; if the
            folder holds a model in the other form, a ``config.json`` that is not a model's, or, without one, weights or
            a card that would be replaced.
    """
    _check_model(model)
    folder = Path(folder)
    _check_folder(folder, fused or is_deployed(model))
    with _made(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        found = _write(
            model, Path(temporary), name or f"local-dir:{folder}", fused, metrics, model_args, license, images, limit
        )
        for file in sorted(Path(temporary).iterdir()):
            os.replace(file, folder / file.name)
    return found


def push_to_hub(
    model: MRConvNeXt,
    repo_id: str,
    *,
    fused: bool = False,
    metrics: Optional[dict[str, Any]] = None,
    model_args: Optional[dict[str, Any]] = None,
    license: Optional[str] = None,
    token: Optional[str] = None,
    private: Optional[bool] = None,
    revision: Optional[str] = None,
    commit_message: str = "Add model",
    create_pr: bool = False,
) -> str:
    """Uploads a model to the Hub, from where ``timm.create_model("hf-hub:REPO_ID", pretrained=True)`` takes it.

    Its weights, config and card take the place of those that the repository has.

    Args:
        model: See `save`, as for ``metrics`` and ``model_args``.
        repo_id: Repository, ``organisation/name``; made if it is not there.
        fused: Whether to upload the deployed form, in float32. A repository holds one form: give each its own.
        metrics: See `save`.
        model_args: See `save`.
        license: See `save`.
        token: See ``huggingface_hub.HfApi``, as for the arguments below. Default: the one that is logged in.
        private: Whether a new repository is private. Default: as the organisation has it.
        revision: Branch, made if it is not there. Default: the main one.
        commit_message: The commit's message.
        create_pr: Whether to open a pull request instead.

    Returns:
        The address of the commit.

    Raises:
        TypeError: See `save`.
        ValueError: See `save`; if ``repo_id`` has no organisation.
        huggingface_hub.errors.HfHubHTTPError: If the Hub refuses.
        ConnectionError: If the Hub can't be reached.
    """
    _check_model(model)
    if "/" not in repo_id:
        raise ValueError(f"repo_id must be organisation/name, got {repo_id!r}")
    with tempfile.TemporaryDirectory() as temporary:
        _write(model, Path(temporary), f"hf-hub:{repo_id}", fused, metrics, model_args, license, None, LIMIT)
        api = HfApi(token=token, library_name="timm", library_version=timm.__version__)
        with _reaching(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=temporary,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )
    return commit.commit_url


def read_config(folder: Path) -> dict[str, Any]:
    """Returns what a folder's ``config.json`` says of its model; nothing if the folder has none.

    Raises:
        ValueError: If it is not a model's configuration, as timm reads it.
    """
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text at all
        raise ValueError(f"{file} is not a model's configuration, but damaged: {error}") from error
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("architecture"), str)
        or not all(isinstance(config.get(name, {}), dict) for name in ("model_args", "pretrained_cfg"))
    ):
        raise ValueError(
            f'{file} is not a model\'s configuration: it must be an object with "architecture", a name, and with '
            f'"model_args" and "pretrained_cfg", objects, if these are there; got {json.dumps(config):.80}'
        )
    for name in ("mean", "std"):
        own = config.get("pretrained_cfg", {}).get(name, [0])
        if not isinstance(own, list) or not own or not all(isinstance(number, (int, float)) for number in own):
            raise ValueError(f'{file} is not a model\'s configuration: "{name}" must be numbers, got {own!r:.80}')
    found = [own.get("num_classes") for own in (config, config.get("pretrained_cfg", {})) if "num_classes" in own]
    if len(set(map(str, found))) > 1:
        raise ValueError(
            f'{file} says twice how many classes its model has, "num_classes" of {found[0]} and {found[1]}'
        )
    return config


def check_name(name: str, also: str = "") -> None:
    """Raises a ValueError if timm knows no model of a name, with or without a tag; it says which names are close.

    Args:
        name: The name.
        also: What else it might have been, for the message.
    """
    base = name.partition(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, possibilities=timm.list_models(), n=5)
        hint = f"close are {', '.join(close)}" if close else "timm.list_models() lists the names"
        raise ValueError(f"{name} is not {also}a model that timm knows: {hint}")


def form_of(model: nn.Module) -> str:
    """Returns in words which form a model is in."""
    return "deployed form" if is_deployed(model) else "training form"


def is_deployed(model: nn.Module) -> bool:
    """Returns whether all layers of a model are in deployed form."""
    return all(layer.kernel is not None for layer in model.modules() if isinstance(layer, MRConv2d))


def random_images(model: MRConvNeXt) -> Tensor:
    """Returns two random images of the size that a model's configuration names."""
    size = (2, model.stem[0].in_channels, *model.pretrained_cfg["input_size"][1:])
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def parity(model: nn.Module, other: nn.Module, images: Tensor) -> Parity:
    """Returns how far a model is from another one with layers of the same names, on ``images``; both in eval mode."""
    layers: dict[str, float] = {}

    def compare(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        layers[name] = _difference(other.get_submodule(name)(*inputs), output)

    hooks = [
        layer.register_forward_hook(lambda *args, name=name: compare(name, *args))
        for name, layer in model.named_modules()
        if isinstance(layer, MRConv2d)
    ]
    try:
        logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    # A NaN is the worst of all, and no comparison is true of it.
    worst = max(layers, key=lambda name: (layers[name] != layers[name], layers[name]))
    return Parity(_difference(other(images), logits), layers[worst], worst)


def _difference(actual: Tensor, expected: Tensor) -> float:
    difference = (actual - expected).abs().max()
    return 0.0 if difference == 0 else (difference / expected.abs().max()).item()  # outputs may all be zero


def _check_model(model: nn.Module) -> None:
    """Raises if timm could not make such a model again."""
    if not isinstance(model, MRConvNeXt):
        raise TypeError(f"model must be an MRConvNeXt, got {type(model).__name__}")
    classifier = getattr(model.head, "fc", None)
    outputs = 0 if isinstance(classifier, nn.Identity) else getattr(classifier, "out_features", None)
    if outputs != model.num_classes:
        raise ValueError(
            f"model.head was replaced: it is {type(model.head).__name__} with the classifier {classifier}, where the "
            f"model has num_classes={model.num_classes}. Change the classes with model.reset_classifier(num_classes), "
            "0 for none, so that timm can make the model again."
        )


def _check_folder(folder: Path, deployed: bool) -> None:
    """Raises if a folder holds a model in the other form, which can't be had back from this one, or files of others."""
    config = read_config(folder)
    foreign = [name for name in ("README.md", "model.safetensors") if (folder / name).exists() and not config]
    if foreign:
        raise ValueError(f"{folder / foreign[0]} is in the way: without a config.json it is not of a saved model")
    arguments = config.get("model_args", {})
    if arguments.get("inference_mode", deployed) != deployed:
        raise ValueError(f"{folder} holds the {'training' if deployed else 'deployed'} form: give each its own folder")


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Makes a folder, and takes away again what was made of its path if nothing was written to it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # folders that hold something refuse to go
            for path in new:
                path.rmdir()


@contextlib.contextmanager
def _reaching(repo_id: str) -> Iterator[None]:
    """Gives errors of the connection to the Hub one class and words that say what was to be done."""
    try:
        yield
    except HfHubHTTPError:
        raise  # the Hub was reached, and refuses
    except (HTTP_ERROR, ConnectionError) as error:
        raise ConnectionError(
            f"the Hub could not be reached to push to {repo_id}: {type(error).__name__}: {error}"
        ) from error


def _write(
    model: MRConvNeXt,
    folder: Path,
    name: str,
    fused: bool,
    metrics: Optional[dict[str, Any]],
    model_args: Optional[dict[str, Any]],
    license: Optional[str],
    images: Optional[Tensor],
    limit: float,
) -> Parity:
    """Writes a model's files, and reads them back. The arguments are those of `save`, and the name that timm knows."""
    exported = _exported(model, fused, license)
    arguments = _arguments(exported, model_args)
    names = exported.pretrained_cfg.pop("label_names", None)
    config = {"label_names": list(names)} if names and len(names) == exported.num_classes else None
    save_for_hf(exported, str(folder), model_config=config, model_args=arguments, safe_serialization=True)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # which safetensors makes private
    try:
        with _quiet_timm(), torch.random.fork_rng(devices=[]):  # a run that saves goes on as it would have
            again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"timm can't make the model again from its architecture {exported.pretrained_cfg['architecture']} and "
            f"model_args={arguments}; give what is missing as model_args. {error}"
        ) from error
    images = random_images(exported) if images is None else images.detach().float().cpu()
    found = parity(copy.deepcopy(model).float().cpu().eval(), again, images)
    if not found.within(limit):
        raise ValueError(
            f"the model written differs from the model by more than limit={limit:.0e}: {found}. nan stands for weights "
            "that are not finite; if the model was made with arguments that are not among these, give them as "
            f"model_args: {json.dumps(arguments)}"
        )
    details = {
        "Form": form_of(exported),
        "Largest difference from the model it was made of": str(found),
        **(metrics or {}),
    }
    (folder / "README.md").write_text(card(exported, name, details, names if config else None), encoding="utf-8")
    return found


@contextlib.contextmanager
def _quiet_timm() -> Iterator[None]:
    """Keeps timm from logging that it loads weights, as it does where they are read back."""
    logger = logging.getLogger("timm")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _exported(model: MRConvNeXt, fused: bool, license: Optional[str]) -> MRConvNeXt:
    """Returns the copy of a model that is written, its configuration that of the model as it is now."""
    exported = copy.deepcopy(model).cpu().to(memory_format=torch.contiguous_format).eval()
    if fused:
        exported.float().reparameterize()
    cfg: Any = exported.pretrained_cfg
    size = cfg["input_size"][1:]
    usual: Any = timm.get_pretrained_cfg(cfg["architecture"])
    if model.started_from is None and usual and tuple(size) == usual.input_size[1:]:
        size = to_2tuple(model.model_args["img_size"])  # all that is known of its images
    exported.pretrained_cfg = {
        **cfg,
        "input_size": (exported.stem[0].in_channels, *size),
        "num_classes": exported.num_classes,
    }
    if model.started_from is None:  # what timm says of published weights is not true of these
        exported.pretrained_cfg |= dict.fromkeys(("tag", "license", "test_input_size", "test_crop_pct"))
    if license is not None:
        exported.pretrained_cfg["license"] = license
    return exported


def _arguments(model: MRConvNeXt, given: Optional[dict[str, Any]]) -> dict[str, Any]:
    """Returns the arguments that make a model like this one, for config.json."""
    arguments = {
        **model.model_args,
        "in_chans": model.stem[0].in_channels,
        "global_pool": model.head.global_pool.pool_type,
        "inference_mode": is_deployed(model),
        **(given or {}),
    }
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"the argument {name}={value!r} can't be written to config.json: make the model with a name instead"
            ) from error
    return arguments
