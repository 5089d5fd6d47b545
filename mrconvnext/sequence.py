"""Encoders of sequences: S4's block with an `MRConv1d` in the place of the state-space layer.

Source: MRConv (Cunningham et al. 2024), section 5, after S4 (Gu et al. 2022).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from .layer import kernel_names, undecayed_names
from .mrconv import MRConv1d
from .options import check_positive
from .streaming import Stream

NORMS = ("batch", "layer")
POOLINGS = ("mean", "last", "none")


def is_a_graph() -> bool:
    """Returns whether a graph is made of this call, by compilers, exporters or traces."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class SequenceNorm(nn.Module):
    """BatchNorm or LayerNorm over the channels of sequences (B, L, C), of whose positions padding does not count.

    Args:
        kind: One of `NORMS`.
        dim: Number of channels C.
        device: Device of the parameters.
        dtype: Type of the parameters.
    """

    def __init__(self, kind: str, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        make: Any = nn.BatchNorm1d if kind == "batch" else nn.LayerNorm
        self.norm = make(dim, device=device, dtype=dtype)
        self.takes_statistics = kind == "batch"

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns sequences (B, L, C), normalised at the positions where the mask (B, L) is True, zero elsewhere."""
        if mask is None:
            return self.norm(x.flatten(0, 1)).view(x.shape)
        if not (self.training and self.takes_statistics):
            return self.norm(x.flatten(0, 1)).view(x.shape).masked_fill(~mask.unsqueeze(-1), 0.0)
        return self._of_real(x, mask)

    @torch.compiler.disable  # how many positions are real is not known in a graph
    def _of_real(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), self.norm(x[mask]))


class SequenceBlock(nn.Module):
    """MRConv → GELU → dropout → pointwise → GLU → dropout → residual, with a norm before or after it.

    Dropout is of whole channels. The published accounts of MRConv's block differ in where it stands; S4 and
    MultiresConv have it in both places.

    Args:
        conv: The long convolution of the channels.
        norm: Kind of norm, one of `NORMS`.
        prenorm: Whether the norm stands before.
        dropout: Rate of the dropout.
    """

    def __init__(self, conv: MRConv1d, norm: str, prenorm: bool, dropout: float, device: Any, dtype: Any) -> None:
        super().__init__()
        dim = conv.channels
        self.prenorm = prenorm
        self.norm = SequenceNorm(norm, dim, device=device, dtype=dtype)
        self.conv = conv
        self.pointwise = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns sequences (B, L, C); of padding, where the mask (B, L) is False, nothing depends on what is there."""
        y = self.norm(x, mask) if self.prenorm else x
        y = self.mix_channels(self.conv(y.mT, mask).mT)
        return x + y if self.prenorm else self.norm(x + y, mask)

    def mix_channels(self, y: Tensor) -> Tensor:
        """Returns what the block makes, position by position, of the convolution's output (B, L, C)."""
        y = self.dropout(nn.functional.gelu(y).mT).mT
        return self.dropout(nn.functional.glu(self.pointwise(y), dim=-1).mT).mT

    def step(self, x: Tensor, stream: Stream) -> Tensor:
        """Returns the next position (B, C) of the output for the next one of the input, in evaluation."""
        y = self.norm(x.unsqueeze(1)).squeeze(1) if self.prenorm else x
        y = self.mix_channels(stream.step(y).unsqueeze(1)).squeeze(1)
        return x + y if self.prenorm else self.norm((x + y).unsqueeze(1)).squeeze(1)


class EncoderState:
    """What `MRConvSequence.step` has seen so far.

    Attributes:
        streams: Those of the layers.
        total: Sum (B, C) of the encoded positions.
        count: Number of positions.
    """

    def __init__(self, streams: list[Stream]) -> None:
        self.streams = streams
        self.total: Optional[Tensor] = None
        self.count = 0


class MRConvSequence(nn.Module, PyTorchModelHubMixin, library_name="mrconvnext"):
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
        dtype: Type of the parameters.
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
        for name, value in (("num_classes", num_classes), ("length", length), ("dim", dim), ("depth", depth)):
            check_positive(name, value)
        for name, word, allowed in (("norm", norm, NORMS), ("pooling", pooling, POOLINGS)):
            if word not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {word!r}")
        if (vocabulary > 0) == (channels > 0):
            raise ValueError(f"give vocabulary or channels, one of the two; got {vocabulary!r} and {channels!r}")
        if pairs and pooling == "none":
            raise ValueError('pairs need pooling="mean" or "last", got "none"')
        dd = {"device": device, "dtype": dtype}
        self.arguments = {
            **{"num_classes": num_classes, "length": length, "vocabulary": vocabulary, "channels": channels},
            **{"dim": dim, "depth": depth, "norm": norm, "prenorm": prenorm, "dropout": dropout},
            **{"pooling": pooling, "pairs": pairs, **options},
        }
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
            return self.head(self.pooled(self.encode(x, mask), mask))
        self._check_pairs(x)
        mask = None if mask is None else mask.flatten(0, 1)
        first, second = self.pooled(self.encode(x.flatten(0, 1), mask), mask).unflatten(0, (-1, 2)).unbind(1)
        return self.head(torch.cat([first, second, first * second, first - second], dim=-1))

    def encode(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns the features (B, L, dim) of each position; the arguments are those of `forward`, of no pairs."""
        self._check_input(x)
        self._check_mask(mask, x)
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x, mask)
        return x if self.norm is None else self.norm(x, mask)

    def pooled(self, features: Tensor, mask: Optional[Tensor]) -> Tensor:
        """Returns features (B, L, dim) as the head takes them: pooled over the positions that are real."""
        if self.pooling == "none":
            return features
        if self.pooling == "mean":
            if mask is None:
                return features.mean(1)
            real = mask.unsqueeze(-1)
            return (features * real).sum(1) / real.sum(1)
        if mask is None:
            return features[:, -1]
        position = torch.arange(mask.shape[1], device=mask.device)
        last = (mask * position).amax(1)
        return features[torch.arange(len(features), device=mask.device), last]

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
        return EncoderState([block.conv.start(batch) for block in self.blocks])

    def step(self, x: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """Returns what `forward` would for the positions so far, the last of them ``x``, and the state after it.

        Without pooling that is the output at the last position. There may be any number of positions; kernels reach
        over the last ``length``.

        Args:
            x: The next position: tokens (B), or vectors (B, channels).
            state: What `start` or the step before returned; it is changed.

        Returns:
            The head's output (B, num_classes), and the state.
        """
        self._check_input(x.unsqueeze(1))
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

    def _save_pretrained(self, save_directory: Path) -> None:
        # The place that huggingface_hub has for it. Its own configuration is that of the model as it was made.
        super()._save_pretrained(save_directory)
        text = json.dumps(self.arguments, sort_keys=True, indent=2)
        (save_directory / "config.json").write_text(text + "\n")

    def no_weight_decay(self) -> set[str]:
        """Returns the names of the parameters that must not decay; see `layer.undecayed_names`."""
        return undecayed_names(self)

    def kernel_parameters(self) -> set[str]:
        """Returns the names of the parameters of long kernels, which take a smaller learning rate than the others."""
        return kernel_names(self)

    # What is refused

    def _check_input(self, x: Tensor) -> None:
        dims = 2 if self.vocabulary else 3
        if x.dim() != dims or (dims == 3 and x.shape[2] != self.channels):
            shape = "tokens (B, L)" if self.vocabulary else f"vectors (B, L, {self.channels})"
            raise ValueError(f"x must be {shape}, got {list(x.shape)}")
        if not 1 <= x.shape[1] <= self.length:
            raise ValueError(f"sequences must have from 1 to length={self.length} positions, got {x.shape[1]}")
        if self.vocabulary == 0:
            if not x.is_floating_point():
                raise TypeError(f"x must be of floating-point numbers, got {x.dtype}")
            return
        if x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens must be int64 or int32, got {x.dtype}")
        if is_a_graph():  # in which values are not known
            return
        if len(x) and (x.min() < 0 or x.max() >= self.vocabulary):
            low, high = int(x.min()), int(x.max())
            raise ValueError(f"tokens must lie in 0 … {self.vocabulary - 1}, got {low} … {high}")

    def _check_mask(self, mask: Optional[Tensor], x: Tensor) -> None:
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            raise ValueError(f"mask must be boolean {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        if not is_a_graph() and not mask.any(1).all():
            raise ValueError("mask must be True somewhere in each sequence: there is one without a position")

    def _check_pairs(self, x: Tensor) -> None:
        if x.dim() < 3 or x.shape[1] != 2:
            raise ValueError(f"x must be pairs of sequences, (B, 2, L) or (B, 2, L, channels), got {list(x.shape)}")
