"""A Python as boards have: no torch, and executorch-numpy-runtime, of which this is a stand-in.

It starts in a tenth of a second, where one with torch takes several on a busy machine. It runs the
file of the tests that takes a third of its input; test_phone.py has the real one.
"""

import shlex
import sys
from pathlib import Path

import numpy as np

RUNTIME = """
import numpy

class Runtime:
    @classmethod
    def get(cls):
        return cls()

    def load_program(self, path):
        assert open(path, "rb").read()[4:6] == b"ET"
        return self

    def load_method(self, name):
        assert name == "forward"
        return lambda inputs: [inputs[0] * numpy.float32(0.333333)]

def runtime_info():
    return {"operators": OPERATORS}
"""
OPERATORS = ["aten::mul.out", "executorch_prim::et_copy_index.tensor"]


def light_python(folder: Path, operators: list[str] | None = None) -> Path:
    """The program for --device-python; its runtime says that it has these operators."""
    site = folder / "site"
    site.mkdir()
    numpy = Path(np.__file__).parent
    for path in (numpy, numpy.with_name("numpy.libs")):
        if path.exists():
            (site / path.name).symlink_to(path)
    said = OPERATORS if operators is None else operators
    (site / "executorch_numpy_runtime.py").write_text(f"OPERATORS = {said!r}\n{RUNTIME}")
    about = site / "executorch_numpy_runtime-1.4.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: executorch-numpy-runtime\nVersion: 1.4.0\n")
    program = folder / "a python=3"
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(site))} exec {sys.executable} -S "$@"\n'
    )
    program.chmod(0o755)
    return program
