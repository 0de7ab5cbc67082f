"""An encoder of rows of numbers, which keeps how its columns are standardised."""

import torch
from torch import Tensor, nn

from contralto.encoders.heads import mlp

__all__ = ["TableEncoder"]


class TableEncoder(nn.Module):
    """Linear layers with ReLU behind each, on standardised rows.

    Parameters
    ----------
    num_inputs : int
        F, columns of a row.
    width : int
        Of all layers, and so of the features.
    depth : int
        Number of layers.

    Attributes
    ----------
    center, spread : Tensor (F,)
        Mean and deviation of the columns, which `learn_scale` takes from rows; 0 and 1 to begin with.

    Examples
    --------
    >>> encoder = TableEncoder(5, width=16)
    >>> rows = torch.randn(100, 5) * 7 + 3
    >>> encoder.learn_scale(rows)
    >>> encoder(encoder.standardize(rows)).shape, encoder.num_features
    (torch.Size([100, 16]), 16)
    """

    center: Tensor
    spread: Tensor

    def __init__(self, num_inputs: int, *, width: int = 128, depth: int = 2) -> None:
        super().__init__()
        self.num_inputs, self.num_features = num_inputs, width
        self.layers = nn.Sequential(mlp([num_inputs, *[width] * depth]), nn.ReLU())
        self.register_buffer("center", torch.zeros(num_inputs))
        self.register_buffer("spread", torch.ones(num_inputs))

    @torch.no_grad()
    def learn_scale(self, rows: Tensor) -> None:
        """Take mean and deviation from rows (N, F); a column that never changes keeps a deviation of 1."""
        spread = rows.double().std(0, correction=0)
        self.center.copy_(rows.double().mean(0))
        self.spread.copy_(torch.where(spread > 1e-12, spread, 1.0))

    def standardize(self, rows: Tensor) -> Tensor:
        """Rows (N, F) as they are in the data to rows that `forward` takes."""
        return ((rows.to(torch.float64) - self.center) / self.spread).to(self.center.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Standardised rows (N, F) to raw features (N, num_features)."""
        features: Tensor = self.layers(x)
        return features
