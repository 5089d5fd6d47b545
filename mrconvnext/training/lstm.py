"""PyTorch's LSTM as an encoder of sequences, to compare with."""

from typing import Optional

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class LSTMSequence(nn.Module):
    """An LSTM with a head on the mean of its outputs. The arguments are those of `sequence.MRConvSequence`."""

    def __init__(
        self,
        num_classes: int,
        vocabulary: int,
        channels: int,
        dim: int,
        depth: int,
        dropout: float,
        pairs: bool,
        bidirectional: bool,
    ) -> None:
        super().__init__()
        if pairs:
            raise ValueError("the LSTM is for single sequences")
        self.embedding = nn.Embedding(vocabulary, dim) if vocabulary else nn.Linear(channels, dim)
        between = dropout if depth > 1 else 0.0
        self.lstm = nn.LSTM(dim, dim, num_layers=depth, batch_first=True, dropout=between, bidirectional=bidirectional)
        self.head = nn.Linear(2 * dim if bidirectional else dim, num_classes)

    def forward(self, x: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """Returns the head's output (B, num_classes) for tokens (B, L) or vectors (B, L, channels), padded behind."""
        x = self.embedding(x)
        if mask is None:
            return self.head(self.lstm(x)[0].mean(1))
        lengths = mask.sum(1)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        features = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]  # zero behind
        return self.head(features.sum(1) / lengths.unsqueeze(1))
