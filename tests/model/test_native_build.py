"""Tests of building and loading the native step: the messages if it cannot be built or loaded."""

import pytest

from model.frozen.native.build import NativeError, build, find_compiler, library_path, variants
from model.frozen.native.library import load_library, open_library, runnable_variants


def test_without_a_compiler_it_says_what_is_lost_and_how_to_get_it(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NativeError, match=r"no C\+\+ compiler found .* torch serves .* apt-get install g\+\+"):
        find_compiler()


def test_a_compiler_that_fails_is_named_and_leaves_the_library_alone(monkeypatch):
    load_library()
    before = library_path().stat()
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(NativeError, match="the C\\+\\+ compiler failed: /bin/false -std=c"):
        build(force=True)
    assert library_path().stat() == before
    assert build() == library_path()  # the library exists, so no compiler is needed


def test_a_library_that_does_not_load_is_named(tmp_path):
    broken = tmp_path / "liballattn.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(NativeError, match=r"liballattn.so does not load .* run python -m model.frozen.native.build"):
        open_library(broken)


def test_every_machine_runs_the_generic_variant_and_none_that_was_not_compiled():
    assert runnable_variants()[0] == "generic"
    assert set(runnable_variants()) <= set(variants())
