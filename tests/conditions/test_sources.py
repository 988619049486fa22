"""What functions name and change, and which functions a class has."""

import functools
import importlib.util

import pytest
from torch import nn

from torchfuse.conditions.sources import (
    descriptors_of,
    edits_modules,
    functions_of,
    is_setup,
    names_in,
    syntax_of,
)


def test_names_are_those_of_inner_functions_and_strings_too():
    def outer(self):
        def inner():
            return self.conv, "bn"

        return inner

    assert {"conv", "bn"} <= names_in(outer.__code__)


class Base(nn.Module):
    def overridden(self):
        return self.conv

    def extended(self):
        return self.conv

    @property
    def stem(self):
        return self.conv

    @staticmethod
    def helper(conv):
        return conv


class Derived(Base):
    def overridden(self):
        return self.bn

    def extended(self):
        return super().extended()

    @functools.cached_property
    def cached(self):
        return self.conv


def test_functions_are_those_of_all_bases_unless_they_are_overridden_for_good():
    names = [name for name, _ in functions_of(Derived)]
    assert sorted(names) == sorted(
        ["overridden", "extended", "cached", "extended", "stem", "helper"]
    )


class Reaching:
    def __get__(self, model, owner):
        return model.conv


class WithObjects(nn.Module):
    found = Reaching()
    limit = 3
    kind = nn.Conv2d
    partial = functools.partial(print, 1)


def test_objects_of_classes_of_their_own_that_stand_for_a_method():
    assert [(name, function.__name__) for name, function in descriptors_of(WithObjects)] == [
        ("found", "__get__")
    ]


@pytest.mark.parametrize("name", ["init_weights", "_reset_parameters", "tie_weights", "extra_repr"])
def test_methods_that_set_up_compute_no_outputs(name):
    assert is_setup(name)


@pytest.mark.parametrize("name", ["initial", "forward", "features", "presets"])
def test_other_methods_may_compute_outputs(name):
    assert not is_setup(name)


class Editing:
    """Never run: only their code counts."""

    def fuse(self):
        for module in self.modules():
            delattr(module, "bn")

    def switch_to_deploy(self):
        self.__delattr__("bn")

    def replaced(self):
        self.forward = self.forward_fused

    def taken_away(self):
        del self.bn

    def features(self, x):
        return self.conv(x)


def test_methods_that_take_modules_away_or_replace_forward_compute_no_outputs():
    edits = {n for n, f in vars(Editing).items() if n[0] != "_" and edits_modules(f.__code__)}
    assert edits == {"fuse", "switch_to_deploy", "replaced", "taken_away"}


def test_a_file_that_was_edited_since_its_import_is_no_source(tmp_path):
    file = tmp_path / "edited.py"
    file.write_text("def one(x):\n    return x.real\n\n\ndef other(x):\n    return x.imag\n")
    spec = importlib.util.spec_from_file_location("edited", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert syntax_of(module.one.__code__) is not None
    file.write_text("def one(x):\n    return x.real\n\n\ndef other(x):\n    return x.mT.conj()\n")
    assert syntax_of(module.other.__code__) is None
