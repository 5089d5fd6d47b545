"""Encoders of sequences, of S4's blocks with an `MRConv1d` in the place of the state-space layer.

Source: MRConv (Cunningham et al. 2024), section 5, after S4 (Gu et al. 2022).
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from .layer import kernel_names, undecayed_names
from .mrconv import MRConv1d
from .options import BranchOptions, check_positive
from .sequence_block import NORMS, SequenceBlock, SequenceNorm, is_a_graph
from .streaming import Stream

# Arguments of the layers that the encoder leaves to them.
LAYER_OPTIONS = (*(field.name for field in fields(BranchOptions)), "inference_mode", "exportable", "made_for")

POOLINGS = ("mean", "last", "none")


# Of jinja2, as huggingface_hub takes it.
CARD = """---
{{ card_data }}
---

An encoder of sequences with multi-resolution convolutions (MRConv, Cunningham et al. 2024). With mrconvnext installed:

```python
from mrconvnext import MRConvSequence

model = MRConvSequence.from_pretrained("this repository or folder").eval()
```
"""


class EncoderState:
    """What `MRConvSequence.step` has seen so far.

    Attributes:
        batch: Number of sequences B.
        streams: Those of the layers.
        total: Sum (B, C) of the encoded positions.
        count: Number of positions.
    """

    def __init__(self, batch: int, streams: list[Stream]) -> None:
        self.batch, self.streams = batch, streams
        self.total: Optional[Tensor] = None
        self.count = 0


class MRConvSequence(nn.Module, PyTorchModelHubMixin, library_name="mrconvnext", model_card_template=CARD):
    """An encoder of sequences, of tokens or of vectors, with a head.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are those of huggingface_hub: a folder or repository
    with ``config.json`` and ``model.safetensors``, in training or deployed form.

    Args:
        num_classes: Numbers that the head gives.
        length: Largest number of positions, and the length of the longest kernel.
        vocabulary: Number of tokens, where the input is tokens.
        channels: Numbers a position, where the input is vectors. One of the two must be given.
        dim: Number of channels C inside.
        depth: Number of blocks.
        norm: "batch" or "layer".
        prenorm: Whether the norm of a block stands before it.
        dropout: Rate of the dropout.
        pooling: "mean" over the positions, "last" position, or "none": an output for each position.
        pairs: Whether the input is pairs of sequences, of which the head compares the pooled features.
        device: Device of the parameters.
        dtype: Type of the parameters, or its name.
        **options: Of `MRConv1d`: ``bidirectional``, ``kernel`` and others.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an argument is outside its range.
    """

    if TYPE_CHECKING:  # else an attribute of a module is a tensor or a module
        blocks: Any

    def __init__(
        self,
        num_classes: int,
        length: int,
        vocabulary: int = 0,
        channels: int = 0,
        dim: int = 128,
        depth: int = 6,
        norm: str = "batch",
        prenorm: bool = False,
        dropout: float = 0.0,
        pooling: str = "mean",
        pairs: bool = False,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.arguments = {
            **{"num_classes": num_classes, "length": length, "vocabulary": vocabulary, "channels": channels},
            **{"dim": dim, "depth": depth, "norm": norm, "prenorm": prenorm, "dropout": dropout},
            **{"pooling": pooling, "pairs": pairs, **options},
        }
        check_arguments(**self.arguments)
        dd = {"device": device, "dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
        self.length, self.vocabulary, self.channels = length, vocabulary, channels
        self.pooling, self.pairs = pooling, pairs
        self.embedding = nn.Embedding(vocabulary, dim, **dd) if vocabulary else nn.Linear(channels, dim, **dd)
        self.blocks = nn.ModuleList(
            SequenceBlock(MRConv1d(dim, length, seed=i, **options, **dd), norm, prenorm, dropout, **dd)
            for i in range(depth)
        )
        self.norm = SequenceNorm(norm, dim, **dd) if prenorm else None
        self.head = nn.Linear(4 * dim if pairs else dim, num_classes, **dd)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns the head's output (B, num_classes), or (B, L, num_classes) without pooling.

        Args:
            x: Tokens (B, L), or vectors (B, L, channels); of pairs (B, 2, L) or (B, 2, L, channels).
            mask: True at the positions that are real, not padding, (B, L) or (B, 2, L). Default: all are.

        Raises:
            TypeError: If ``x`` is not of whole numbers for tokens, of floating-point ones for vectors.
            ValueError: If a shape is another one, sequences are empty or longer than ``length``, or tokens are out of
                range.
        """
        if not self.pairs:
            return self.head(pooled(self.encode(x, mask), mask, self.pooling))
        if x.dim() < 3 or x.shape[1] != 2:
            raise ValueError(f"x must be pairs of sequences, (B, 2, L) or (B, 2, L, channels), got {list(x.shape)}")
        check_mask(mask, x.shape[:3])
        mask = None if mask is None else mask.flatten(0, 1)
        both = pooled(self.encode(x.flatten(0, 1), mask), mask, self.pooling)
        first, second = both.unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat([first, second, first * second, first - second], dim=-1))

    def encode(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns the features (B, L, dim) of each position; the arguments are those of `forward`, of no pairs."""
        check_sequences(x, self.vocabulary, self.channels, self.length)
        check_mask(mask, x.shape[:2])
        if mask is not None and not self.vocabulary:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)  # gradients too would take what is there
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, mask)
        return x if self.norm is None else self.norm(x, mask)

    # Position by position

    def start(self, batch: int) -> EncoderState:
        """Returns the state of `step` before the first position, for so many sequences at once.

        Raises:
            RuntimeError: If the model is bidirectional, or in training mode.
            ValueError: If the model is for pairs.
        """
        if self.training:
            raise RuntimeError("start is for a model in evaluation: call eval() before")
        if self.pairs:
            raise ValueError("start is for one sequence at a time, and this model compares pairs")
        return EncoderState(batch, [block.conv.start(batch) for block in self.blocks])

    @torch.no_grad()
    def step(self, x: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """Returns what `forward` would for the positions so far, the last of them ``x``, and the state after it.

        Without gradients.

        Without pooling that is the output at the last position. There may be any number of positions; kernels reach
        over the last ``length``.

        Args:
            x: The next position: tokens (B), or vectors (B, channels).
            state: What `start` or the step before returned; it is changed.

        Returns:
            The head's output (B, num_classes), and the state.

        Raises:
            RuntimeError: If the model is in training mode.
            ValueError: If ``x`` has another shape, the state is of another model, or tokens are out of range.
        """
        if self.training:
            raise RuntimeError("step is for a model in evaluation: call eval() before")
        shape = [state.batch] if self.vocabulary else [state.batch, self.channels]
        if list(x.shape) != shape:
            raise ValueError(f"x must be {shape}, for the state of {state.batch} sequences, got {list(x.shape)}")
        if len(state.streams) != len(self.blocks):
            raise ValueError(f"state must be of a model of {len(self.blocks)} blocks, got {len(state.streams)}")
        check_sequences(x.unsqueeze(1), self.vocabulary, self.channels, self.length)
        x = self.embedding(x)
        for block, stream in zip(self.blocks, state.streams):
            x = block.step(x, stream)
        if self.norm is not None:
            x = self.norm(x.unsqueeze(1)).squeeze(1)
        state.count += 1
        if self.pooling != "mean":
            return self.head(x), state
        state.total = x if state.total is None else state.total + x
        return self.head(state.total / state.count), state

    # Deployment and training

    def reparameterize(self) -> "MRConvSequence":
        """Folds every layer into one kernel and one bias, in place, and returns the model."""
        for block in self.blocks:
            block.conv.reparameterize()
        return self

    def resample(self, factor: float) -> "MRConvSequence":
        """Moves the kernels to sequences sampled ``factor`` times as densely, in place, and returns the model.

        See `MRConv1d.resample`.
        """
        for block in self.blocks:
            block.conv.resample(factor)
        conv = self.blocks[0].conv
        self.length = conv.reference_grid[0]
        self.arguments.update(length=self.length, made_for=conv.made_for[0])
        return self

    # The places that huggingface_hub has for what a library does differently.

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        dtype = str(self.head.weight.dtype).removeprefix("torch.")
        text = json.dumps({**self.arguments, "dtype": dtype}, sort_keys=True, indent=2)
        (save_directory / "config.json").write_text(text + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> "MRConvSequence":
        """Returns the model of a folder or repository, in the form and type of its weights; see huggingface_hub.

        Raises:
            ValueError: If there is none, or one that is damaged or incomplete.
        """
        source = pretrained_model_name_or_path
        check_config(Path(source))
        try:
            return super().from_pretrained(source, strict=True, **options)
        except (RuntimeError, SafetensorError, TypeError) as error:
            raise ValueError(f"{source} does not hold an MRConvSequence: {' '.join(str(error).split())}") from error

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that must not decay; see `layer.undecayed_names`."""
        return undecayed_names(self)

    def kernel_parameters(self) -> set[str]:
        """Returns the names of the parameters of long kernels, which take a smaller learning rate than the others."""
        return kernel_names(self)


def pooled(features: Tensor, mask: Optional[Tensor], pooling: str) -> Tensor:
    """Returns features (B, L, dim) as the head takes them: pooled over the positions that are real."""
    if pooling == "none":
        return features
    if pooling == "mean":
        if mask is None:
            return features.mean(1)
        real = mask.unsqueeze(-1)
        return (features * real).sum(1) / real.sum(1)
    if mask is None:
        return features[:, -1]
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * position).amax(1)
    return features[torch.arange(len(features), device=mask.device), last]


def check_sequences(x: Tensor, vocabulary: int, channels: int, length: int) -> None:
    """Raises if ``x`` is neither tokens (B, L) nor vectors (B, L, channels), whichever it should be; see `forward`."""
    dims = 2 if vocabulary else 3
    if x.dim() != dims or (dims == 3 and x.shape[2] != channels):
        shape = "tokens (B, L)" if vocabulary else f"vectors (B, L, {channels})"
        raise ValueError(f"x must be {shape}, got {list(x.shape)}")
    if not 1 <= x.shape[1] <= length:
        raise ValueError(f"sequences must have from 1 to length={length} positions, got {x.shape[1]}")
    if vocabulary == 0:
        if not x.is_floating_point():
            raise TypeError(f"x must be of floating-point numbers, got {x.dtype}")
        return
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32, got {x.dtype}")
    if is_a_graph():  # in which values are not known
        return
    if len(x) and (x.min() < 0 or x.max() >= vocabulary):
        raise ValueError(f"tokens must lie in 0 … {vocabulary - 1}, got {int(x.min())} … {int(x.max())}")


def check_config(folder: Path) -> None:
    """Raises a ValueError if what is a folder has no configuration that can be read."""
    if not folder.is_dir():
        return  # but a repository
    try:
        if not isinstance(json.loads((folder / "config.json").read_text()), dict):
            raise ValueError("config.json does not hold names with their values")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} does not hold an MRConvSequence: config.json can't be read ({error})") from error


def check_mask(mask: Optional[Tensor], shape: torch.Size) -> None:
    """Raises a ValueError if a mask is not boolean or of another shape, or if a sequence is padding alone."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"mask must be boolean {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    if not is_a_graph() and not mask.any(-1).all():
        raise ValueError("mask must be True somewhere in each sequence: there is one without a position")


def check_arguments(
    num_classes: int,
    length: int,
    vocabulary: int,
    channels: int,
    dim: int,
    depth: int,
    norm: str,
    prenorm: bool,
    dropout: float,
    pooling: str,
    pairs: bool,
    **options: Any,
) -> None:
    """Raises a ValueError if an argument of `MRConvSequence` is outside its range, a TypeError if one is unknown."""
    for name, value in (("num_classes", num_classes), ("length", length), ("dim", dim), ("depth", depth)):
        check_positive(name, value)
    for name, word, allowed in (("norm", norm, NORMS), ("pooling", pooling, POOLINGS)):
        if word not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {word!r}")
    for name, value in (("prenorm", prenorm), ("pairs", pairs)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    for name, value in (("vocabulary", vocabulary), ("channels", channels)):
        if value != 0:
            check_positive(name, value)
    if (vocabulary > 0) == (channels > 0):
        raise ValueError(f"give vocabulary or channels, one of the two; got {vocabulary!r} and {channels!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
    if pairs and pooling == "none":
        raise ValueError('pairs need pooling="mean" or "last", got "none"')
    for name in options:
        if name not in LAYER_OPTIONS:
            raise TypeError(
                f"{name!r} is not an argument of the encoder, nor of its layers: {', '.join(LAYER_OPTIONS)}"
            )
