"""CRNN (Shi et al. 2015): convolutions, some with a batch norm, then an LSTM over the width."""

from torch import Tensor, nn


class CRNN(nn.Module):
    """Text lines 1×32×W to W / 4 + 1 rows of class scores."""

    def __init__(self, width: int = 64, hidden: int = 256, classes: int = 37):
        super().__init__()
        w = width
        self.cnn = nn.Sequential()
        rows = (
            # inputs, outputs, kernel, padding, batch norm, pooling
            (1, w, 3, 1, False, nn.MaxPool2d(2, 2)),
            (w, 2 * w, 3, 1, False, nn.MaxPool2d(2, 2)),
            (2 * w, 4 * w, 3, 1, True, None),
            (4 * w, 4 * w, 3, 1, False, nn.MaxPool2d((2, 2), (2, 1), (0, 1))),
            (4 * w, 8 * w, 3, 1, True, None),
            (8 * w, 8 * w, 3, 1, False, nn.MaxPool2d((2, 2), (2, 1), (0, 1))),
            (8 * w, 8 * w, 2, 0, True, None),
        )
        for i, (inputs, outputs, kernel, padding, norm, pooling) in enumerate(rows):
            self.cnn.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, kernel, 1, padding))
            if norm:
                self.cnn.add_module(f"batchnorm{i}", nn.BatchNorm2d(outputs))
            self.cnn.add_module(f"relu{i}", nn.ReLU(True))
            if pooling is not None:
                self.cnn.add_module(f"pooling{i}", pooling)
        self.rnn = nn.LSTM(8 * w, hidden, bidirectional=True)
        self.embedding = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.cnn(x).squeeze(2).permute(2, 0, 1)
        return self.embedding(self.rnn(features)[0])
