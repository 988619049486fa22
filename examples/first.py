import torch
import torchfuse
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

    def forward(self, x):
        y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return y + self.bn2(y)


result = torchfuse.fuse(Net().eval(), torch.rand(1, 3, 32, 32))
print(result.plan)
print(result.check)
