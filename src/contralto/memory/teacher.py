"""What a network was at the end of the last task: a frozen copy that the network is asked to stay true to."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from contralto.errors import UsageError
from contralto.memory.momentum import momentum_copy

__all__ = ["Mode", "Teacher"]

Mode = Literal["train", "eval"]


class Teacher(nn.Module):
    """Copies of some modules, taken at the ends of tasks. Part of the state dict; takes no gradient.

    Parameters
    ----------
    mode : {"eval", "train"}
        "eval": the copies always behave as in use. "train": they are in training mode whenever the module around them is, so that
        batch norm sees the statistics of the current batch, as in the network that learns, and goes on to follow them.
    **parts : nn.Module
        What is copied, by name.

    Examples
    --------
    >>> layer = nn.Linear(2, 2)
    >>> teacher = Teacher(layer=layer)
    >>> bool(teacher.taken), teacher.take(layer=layer), bool(teacher.taken)
    (False, None, True)
    >>> teacher("layer", torch.zeros(3, 2)).requires_grad
    False
    """

    taken: Tensor

    def __init__(self, *, mode: Mode = "eval", **parts: nn.Module) -> None:
        super().__init__()
        if mode not in ("train", "eval"):
            raise UsageError(f'mode must be "train" or "eval", got {mode!r}')
        self.mode = mode
        self.parts = nn.ModuleDict({name: momentum_copy(part) for name, part in parts.items()})
        self.register_buffer("taken", torch.zeros((), dtype=torch.bool))
        self.train(self.training)

    def take(self, **parts: nn.Module) -> None:
        """Copy the weights and statistics of all parts as they are now."""
        if parts.keys() != set(self.parts):
            raise UsageError(f"a teacher of {', '.join(self.parts)} cannot take {', '.join(parts) or 'nothing'}")
        for name, part in parts.items():
            self.parts[name].load_state_dict(part.state_dict())
        self.taken.fill_(True)

    @torch.no_grad()
    def forward(self, part: str, *args: Any, **kwargs: Any) -> Any:
        """What a part gives for these arguments."""
        return self.parts[part](*args, **kwargs)

    def weight(self, part: str) -> Tensor:
        """The weight of a part, such as the prototypes of a linear layer."""
        weight = self.parts[part].weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def train(self, mode: bool = True) -> "Teacher":
        """Follow the module around, or stay as in use."""
        return super().train(mode and self.mode == "train")
