"""What OpenVLA-OFT adds to OpenVLA: the L1 regression head and the projector of the proprioceptive state."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(x) + x  # type: ignore[no-any-return]


class ResidualMLP(nn.Module):
    """LayerNorm, a linear layer, two residual blocks, LayerNorm, a linear layer."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden_dim) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))  # type: ignore[no-any-return]


class L1ActionHead(nn.Module):
    """Normalised actions out of the hidden states at the action positions.

    Args:
        hidden_size: width of the language model.
        action_dim: numbers of one action; each has its own position in the sequence.
    """

    def __init__(self, hidden_size: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.model = ResidualMLP(hidden_size * action_dim, hidden_size, action_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, chunk * action_dim, hidden_size) -> (batch, chunk, action_dim)."""
        batch, positions, _ = hidden.shape
        return self.model(hidden.reshape(batch, positions // self.action_dim, -1))  # type: ignore[no-any-return]


class ProprioProjector(nn.Module):
    """The normalised proprioceptive state (batch, proprio_dim) as one token (batch, hidden_size)."""

    def __init__(self, hidden_size: int, proprio_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(proprio)))  # type: ignore[no-any-return]
