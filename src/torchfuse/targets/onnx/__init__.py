"""ONNX (`.onnx`), run by ONNX Runtime: any machine with a CPU, the browser, most accelerators."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfuse.errors import ArtifactError
from torchfuse.targets.sealing import damaged, sealed_text, unseal_text
from torchfuse.targets.target import CheckedFile, Files, Made, Request, Target

if TYPE_CHECKING:
    from torchfuse.targets.onnx.session import OnnxModel

__all__ = ["Onnx"]

_KEY = b"torchfuse"
_METADATA_PROPS = 14  # ModelProto's field: onnx/onnx.proto
_KEY_FIELD, _VALUE_FIELD = 1, 2  # StringStringEntryProto's
_LENGTH_DELIMITED = 2  # a wire type of protocol buffers


class Onnx(Target):
    """An ONNX model in one file, for ONNX Runtime's CPU kernels."""

    name = "ONNX Runtime"
    suffix = ".onnx"
    extra = "onnx"
    modules = ("onnx", "onnxruntime", "onnxscript")
    distribution = "onnxruntime"
    precisions = ("fp32", "int8")
    folds = ("conv + bn", "conv + add or mul by constants", "conv + relu", "matmul + add")
    quantized_by = "pt2e"

    def make(self, request: Request) -> Made:
        """Return the model by torch.onnx.export; int8 as QDQ of XNNPACK's PT2E graph."""
        from torchfuse.targets.onnx.onnx_file import made

        return made(request)

    def seal(self, files: Files, metadata: Mapping[str, Any]) -> Files:
        """Return the model with one more entry in its metadata_props, at the end.

        Protocol buffers may be appended to: the entry joins those that are there.
        """
        model = files[self.suffix]
        text = sealed_text(model, metadata).encode()
        return {self.suffix: model + _entry_before(len(text)) + text}

    def unseal(self, path: Path, files: Files) -> Mapping[str, Any] | None:
        """Return what is in the last entry of metadata_props, if that is ours."""
        data = files[self.suffix]

        def model(before: bytes) -> bytes:
            entry = _entry_before(len(data) - len(before))
            return before.removesuffix(entry) if before.endswith(entry) else b""

        return unseal_text(path, data, b"", model)

    def check(self, path: Path, files: Files) -> None:
        """Raise ArtifactError unless the file is an ONNX model, whole and valid."""
        self.require()
        import onnx

        try:
            model = onnx.load_model_from_string(files[self.suffix])
            outside = _outside(path, model)
            if not outside:
                onnx.checker.check_model(model)
        except Exception as error:
            raise damaged(path, f"it is no valid ONNX model ({error!s:.100})") from error
        if outside:
            raise ArtifactError(
                f"Expected an ONNX model in one file, but '{path}' has its weights in {outside} "
                f"beside it; write it into one: onnx.save(onnx.load('{path}'), 'one_file.onnx')."
            )

    def first_load(self, path: Path) -> None:
        """Make a session of it."""
        from torchfuse.targets.onnx.session import session

        session(path.read_bytes(), 1)

    def preload(self) -> None:
        """Import the runtime, which starts threads with a session only."""
        import onnxruntime  # noqa: F401  # to have it in memory

    def load(self, file: CheckedFile, *, threads: int | None = None) -> "OnnxModel":
        """Return the model in a session of its own."""
        from torchfuse.targets.onnx.session import OnnxModel

        metadata = file.metadata or {}
        return OnnxModel(
            file.data, metadata.get("signature"), metadata.get("preprocessing"), threads
        )


def _outside(path: Path, model: Any) -> str:
    """Return the names of the files beside a model that it has weights in; "" where it has none."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    names = {
        ExternalDataInfo(tensor).location
        for tensor in model.graph.initializer
        if uses_external_data(tensor)
    }
    return ", ".join(
        f"'{name}'" + ("" if (path.parent / name).is_file() else ", which is missing,")
        for name in sorted(names)
    )


def _entry_before(text_length: int) -> bytes:
    """Return the bytes of an entry of metadata_props that come before its value."""
    key = _tag(_KEY_FIELD) + _varint(len(_KEY)) + _KEY
    value = _tag(_VALUE_FIELD) + _varint(text_length)
    return _tag(_METADATA_PROPS) + _varint(len(key) + len(value) + text_length) + key + value


def _tag(field: int) -> bytes:
    return _varint(field << 3 | _LENGTH_DELIMITED)


def _varint(number: int) -> bytes:
    """Return an integer as protocol buffers write it: seven bits a byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
