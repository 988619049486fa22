"""OpenVINO (`.xml` + `.bin`): Intel's runtime, for CPUs of any make."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.targets.sealing import damaged, digests, sealed_text, unseal_text
from torchfuse.targets.target import CheckedFile, Files, Made, Request, Target

if TYPE_CHECKING:
    from torchfuse.targets.openvino.compiled_model import OpenVinoModel

__all__ = ["OpenVino"]

_WEIGHTS = ".bin"
_COMMENT, _COMMENT_END = b"<!-- ", b" -->\n"


class OpenVino(Target):
    """An OpenVINO model: an XML file, and its weights beside it."""

    name = "OpenVINO"
    suffix = ".xml"
    beside = (_WEIGHTS,)
    extra = "openvino"
    modules = ("openvino", "nncf", "onnx", "onnxscript")
    distribution = "openvino"
    precisions = ("fp32", "fp16", "bf16", "int8")
    folds = (
        "conv + bn", "conv + add or mul by constants", "conv + activation", "linear + activation",
    )  # fmt: skip
    quantized_by = "pt2e"

    def make(self, request: Request) -> Made:
        """Return the model converted; int8 by NNCF, or as QDQ of what `quantize` made."""
        from torchfuse.targets.openvino.conversion import made

        return made(request)

    def seal(self, files: Files, metadata: Mapping[str, Any]) -> Files:
        """Return the files, the first with a comment at its end, which every reader skips."""
        text = sealed_text(files[self.suffix], {**metadata, "beside": _digests(files)})
        sealed = files[self.suffix] + _COMMENT + text.encode() + _COMMENT_END
        return {**files, self.suffix: sealed}

    def unseal(self, path: Path, files: Files) -> Mapping[str, Any] | None:
        """Return what is in the comment; the weights are compared with their checksum in it."""
        data = files[self.suffix]
        metadata = unseal_text(path, data, _COMMENT_END, lambda before: before[: -len(_COMMENT)])
        if metadata is not None and metadata.get("beside") != _digests(files):
            raise damaged(
                path, f"the '{_WEIGHTS}' beside it does not have the SHA-256 they were sealed with"
            )
        return metadata

    def check(self, path: Path, files: Files) -> None:
        """Raise ArtifactError unless the XML is whole and its weights are as long as it says."""
        from xml.etree import ElementTree

        data = files[self.suffix]
        try:
            if re.search(rb"<!(DOCTYPE|ENTITY)", data) is not None:
                raise damaged(path, "an OpenVINO model declares no entities")
            root = ElementTree.fromstring(data)  # noqa: S314  # nothing is declared in it
        except ElementTree.ParseError as error:
            raise damaged(path, f"it is no whole XML ({error})") from error
        if root.tag != "net":
            raise damaged(path, f"an OpenVINO model is a <net>, this is a <{root.tag}>")
        ends = [
            int(constant.get("offset", 0)) + int(constant.get("size", 0))
            for constant in root.iter("data")
        ]
        if max(ends, default=0) > len(files[_WEIGHTS]):
            raise damaged(
                path,
                f"it needs {max(ends):,} bytes of weights, but the '{_WEIGHTS}' beside it has "
                f"{len(files[_WEIGHTS]):,}",
            )

    def first_load(self, path: Path) -> None:
        """Compile it."""
        from torchfuse.targets.openvino.compiled_model import OpenVinoModel

        weights = path.with_name(path.name.removesuffix(self.suffix) + _WEIGHTS)
        OpenVinoModel(path.read_bytes(), weights.read_bytes(), threads=1)

    def preload(self) -> None:
        """Import the runtime, which starts threads when it compiles something."""
        import openvino  # noqa: F401  # to have it in memory

    def load(self, file: CheckedFile, *, threads: int | None = None) -> "OpenVinoModel":
        """Return the model compiled for this CPU, in the precision that the file says."""
        from torchfuse.targets.openvino.compiled_model import OpenVinoModel

        metadata = file.metadata or {}
        return OpenVinoModel(
            file.data,
            file.beside[_WEIGHTS],
            metadata.get("signature"),
            metadata.get("preprocessing"),
            precision=metadata.get("precision", "fp32"),
            threads=threads,
        )


def _digests(files: Files) -> dict[str, str]:
    return digests({_WEIGHTS: files[_WEIGHTS]})
