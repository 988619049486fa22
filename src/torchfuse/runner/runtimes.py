"""What runs a model file: each runtime loads one, and gives a call of it on given inputs."""

import contextlib
import functools
import importlib
import math
import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Runtime", "decoded", "runtime_for"]

Tensor = Any  # a torch tensor or a numpy array, as the runtime takes it
FlatOutput = tuple[str, list[int], bytes]  # type, shape, values in row-major order


class Runtime(Protocol):
    """Loads model files of one kind and calls them."""

    name: str
    version: str
    is_debug_build: bool

    def set_threads(self, count: int) -> int | None:
        """Run on so many threads; None: it cannot be told."""

    def tensor(self, data: bytearray, dtype: str, shape: list[int], strides: list[int]) -> Tensor:
        """Return an input of these values; strides are in elements."""

    def load(self, path: str, form: str) -> Any:
        """Return the model in the file."""

    def call(self, model: Any, args: list[Any], kwargs: dict[str, Any]) -> Callable[[], Any]:
        """Return a call of the model on these inputs."""

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """Return what the model is loaded and called in."""

    def flat(self, outputs: Any) -> list[FlatOutput]:
        """Return the tensors among what a call returned."""

    def operators(self) -> list[str]:
        """Return the names of the operators that it has kernels for; empty: it does not say."""


class _Torch:
    """TorchScript files, on torch."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self.version = str(torch.__version__)
        self.is_debug_build = bool(torch.version.debug)

    def set_threads(self, count: int) -> int | None:
        self._torch.set_num_threads(count)
        return count

    def tensor(self, data: bytearray, dtype: str, shape: list[int], strides: list[int]) -> Tensor:
        kind = getattr(self._torch, dtype)
        flat = (
            self._torch.frombuffer(data, dtype=kind) if data else self._torch.empty(0, dtype=kind)
        )
        # A copy lies in memory of torch's own, which is aligned for vector instructions.
        return flat.as_strided(shape, strides).clone(memory_format=self._torch.preserve_format)

    def load(self, path: str, form: str) -> Any:
        quantized: Any = self._torch.backends.quantized  # its stub lacks what is set on it
        before = quantized.engine
        # int8 weights are packed for an engine as they are loaded: for the phone's, as torchfuse
        # itself loads them. x86's own overflow where the CPU has no VNNI.
        if "qnnpack" in quantized.supported_engines:
            quantized.engine = "qnnpack"
        try:
            if form == "ptl":
                from torch.jit.mobile import _load_for_lite_interpreter

                return _load_for_lite_interpreter(path)
            return self._torch.jit.load(path, map_location="cpu").eval()
        finally:
            quantized.engine = before

    def call(self, model: Any, args: list[Any], kwargs: dict[str, Any]) -> Callable[[], Any]:
        return functools.partial(model, *args, **kwargs)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return self._torch.inference_mode()

    def flat(self, outputs: Any) -> list[FlatOutput]:
        from torch.utils import _pytree

        leaves = _pytree.tree_leaves(outputs)
        return [self._flat(leaf) for leaf in leaves if isinstance(leaf, self._torch.Tensor)]

    def _flat(self, tensor: Any) -> FlatOutput:
        whole = (tensor.dequantize() if tensor.is_quantized else tensor).detach().contiguous()
        data = whole.reshape(-1).view(self._torch.uint8).numpy().tobytes()
        return str(whole.dtype).rpartition(".")[2], list(whole.shape), data

    def operators(self) -> list[str]:
        return []


class _ExecuTorch(_Torch):
    """ExecuTorch programs, on ExecuTorch's own bindings."""

    name = "executorch"

    def __init__(self) -> None:
        super().__init__()
        # Not executorch.runtime: importing that brings all of its exporter in, which takes seconds.
        from executorch.extension.pybindings import _C

        self._bindings = _C
        self.version = version("executorch")

    def set_threads(self, count: int) -> int | None:
        super().set_threads(count)
        self._bindings._unsafe_reset_threadpool(count)
        return count

    def load(self, path: str, _form: str) -> Any:
        # The method points into the program, and the program into the file: both are kept.
        program = self._bindings._load_program(path)
        return program, program.load_method("forward")

    def call(self, model: Any, args: list[Any], _kwargs: dict[str, Any]) -> Callable[[], Any]:
        method = model[1]

        def call() -> Any:
            # As in a native loop: outputs stay in the program's memory until someone wants them.
            method.set_inputs(args)
            method.execute()
            return method

        return call

    def flat(self, outputs: Any) -> list[FlatOutput]:
        return super().flat(outputs.get_outputs())

    def operators(self) -> list[str]:
        return sorted(self._bindings._get_operator_names())


class _ExecuTorchNumpy:
    """ExecuTorch programs, on executorch-numpy-runtime: where there is no torch."""

    name = "executorch-numpy-runtime"
    is_debug_build = False

    def __init__(self) -> None:
        # By name, since type checkers find neither where ExecuTorch's own bindings are.
        self._runtime = importlib.import_module("executorch_numpy_runtime")
        self._numpy = importlib.import_module("numpy")
        self.version = version("executorch-numpy-runtime")

    def set_threads(self, _count: int) -> int | None:
        return None  # it takes as many as it finds cores

    def tensor(self, data: bytearray, dtype: str, shape: list[int], strides: list[int]) -> Tensor:
        bits = "uint16" if dtype == "bfloat16" else dtype  # how this runtime takes bfloat16
        flat = self._numpy.frombuffer(data, dtype=bits)
        in_bytes = [stride * flat.itemsize for stride in strides]
        strided = self._numpy.lib.stride_tricks.as_strided(flat, shape, in_bytes)
        return self._numpy.ascontiguousarray(strided)

    def load(self, path: str, _form: str) -> Any:
        return self._runtime.Runtime.get().load_program(path).load_method("forward")

    def call(self, model: Any, args: list[Any], _kwargs: dict[str, Any]) -> Callable[[], Any]:
        return functools.partial(model, args)

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def flat(self, outputs: Any) -> list[FlatOutput]:
        arrays = [self._numpy.asarray(output) for output in outputs]
        names = {"uint16": "bfloat16"}
        return [(names.get(str(a.dtype), str(a.dtype)), list(a.shape), a.tobytes()) for a in arrays]

    def operators(self) -> list[str]:
        return sorted(self._runtime.runtime_info()["operators"])


class _OfTarget(_Torch):
    """Files of any other target, where torchfuse itself is installed."""

    def __init__(self, form: str) -> None:
        super().__init__()
        # By name, since the archive that is pushed to devices holds none of it.
        self._target = importlib.import_module("torchfuse.targets").target_of(form)
        self._opening = importlib.import_module("torchfuse.targets.opening")
        self._target.require_runtime()
        self._target.preload()
        self.name = self._target.name
        self.version = self._target.version or "unknown"
        self._threads: int | None = None

    def set_threads(self, count: int) -> int | None:
        super().set_threads(count)
        self._threads = count
        return count

    def load(self, path: str, _form: str) -> Any:
        return self._target.load(self._opening.check(path), threads=self._threads)

    def call(self, model: Any, args: list[Any], kwargs: dict[str, Any]) -> Callable[[], Any]:
        if hasattr(model, "bound"):
            call: Callable[[], Any] = model.bound(args)
            return call
        return super().call(model, args, kwargs)

    def flat(self, outputs: Any) -> list[FlatOutput]:
        leaves = outputs if isinstance(outputs, list | tuple) else [outputs]
        return [self._flat(self._torch.as_tensor(leaf)) for leaf in leaves]


@functools.cache
def runtime_for(form: str) -> Runtime:
    """Return what runs files of this form (pt, ptl, pte, and here those of every target).

    Raises:
        RuntimeError: nothing does; the text says what to install.
    """
    if form in ("pt", "ptl"):
        try:
            return _Torch()
        except ImportError as error:
            raise RuntimeError(
                f"a .{form} needs torch, which {sys.executable} has not; install torch there, or "
                "measure a .pte"
            ) from error
    if form != "pte":
        try:
            return _OfTarget(form)
        except ImportError:
            raise RuntimeError(
                f"expected a .pte, .pt or .ptl file, got one that ends in '.{form}', which runs "
                f"only where torchfuse itself is installed, and {sys.executable} has it not"
            ) from None
        except Exception as error:  # of torchfuse: an unknown suffix, a runtime that is missing
            raise RuntimeError(str(error)) from error
    for kind in (_ExecuTorch, _ExecuTorchNumpy):
        with contextlib.suppress(ImportError):
            return kind()
    raise RuntimeError(
        f"a .pte needs executorch or executorch-numpy-runtime, and {sys.executable} (Python "
        f"{platform.python_version()}) has neither; install one there: 'python3 -m pip install "
        "executorch-numpy-runtime' (Python 3.12 or newer)"
    )


def decoded(value: Any, runtime: Runtime, folder: Path) -> Any:
    """Return an argument from its JSON form: the values of a tensor are ones, or in a file."""
    if isinstance(value, list):
        return [decoded(item, runtime, folder) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(decoded(item, runtime, folder) for item in value["tuple"])
    if "dict" in value:
        return {key: decoded(item, runtime, folder) for key, item in value["dict"].items()}
    if "ones" in value:
        shape = value["ones"]
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return runtime.tensor(
            bytearray(_one(value["dtype"]) * math.prod(shape)), value["dtype"], shape, strides
        )
    data = bytearray((folder / value["file"]).read_bytes())
    return runtime.tensor(data, value["dtype"], value["shape"], value["strides"])


_ONES = {
    "float32": b"\x00\x00\x80\x3f",
    "float64": b"\x00\x00\x00\x00\x00\x00\xf0\x3f",
    "float16": b"\x00\x3c",
    "bfloat16": b"\x80\x3f",
    "uint8": b"\x01",
    "int8": b"\x01",
    "bool": b"\x01",
    **{f"int{8 * size}": (1).to_bytes(size, "little") for size in (2, 4, 8)},
}


def _one(dtype: str) -> bytes:
    if dtype not in _ONES:
        raise ValueError(f"expected a type of {', '.join(_ONES)}, got '{dtype}'")
    return _ONES[dtype]
