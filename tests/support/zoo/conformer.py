"""A Conformer block (Gulati et al. 2020): half feed-forwards around attention and convolution."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Sequential):
    """Layer norm, expand four times, SiLU, contract."""

    def __init__(self, width: int):
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )


class ConvModule(nn.Module):
    """Pointwise with a gate, depthwise, batch norm, SiLU, pointwise, over time."""

    def __init__(self, width: int, kernel: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.pointwise_in = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = nn.BatchNorm1d(width)
        self.pointwise_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x).transpose(1, 2)
        x = F.glu(self.pointwise_in(x), dim=1)
        x = F.silu(self.batch_norm(self.depthwise(x)))
        return self.pointwise_out(x).transpose(1, 2)


class ConformerBlock(nn.Module):
    """[N, T, width] to [N, T, width]."""

    def __init__(self, width: int = 144, heads: int = 4, kernel: int = 31):
        super().__init__()
        self.before = FeedForward(width)
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.conv = ConvModule(width, kernel)
        self.after = FeedForward(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.conv(x)
        return self.norm(x + 0.5 * self.after(x))
