"""Why the extension is missing, told by what lies around the package."""

import importlib.machinery
import sys
import warnings

import pytest

from atp_kernels import extension


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder without the extension, and no other copy in sight."""
    folder = tmp_path / "here" / "atp_kernels"
    folder.mkdir(parents=True)
    monkeypatch.setattr(extension, "_PACKAGE", folder)
    monkeypatch.setitem(sys.modules, "atp_kernels._C", None)
    monkeypatch.setattr(sys, "path", [])
    return folder


def install(folder):
    """Another copy, with the extension."""
    (folder / "atp_kernels").mkdir(parents=True)
    (folder / "atp_kernels" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    (folder / "atp_kernels-0.1.0.dist-info").mkdir()
    (folder / "atp_kernels-0.1.0.dist-info" / "METADATA").write_text("Name: atp-kernels\nVersion: 0.1.0\n")


def make_source(package):
    (package.parent / "csrc").mkdir()
    (package.parent / "setup.py").touch()


def test_an_installed_package_gives_the_reason_of_its_build(package):
    module, reason = extension.load()
    assert module is None and "was not built; with torch" in reason and "ATP_BUILD=1 pip install" in reason
    (package / "_C.missing").write_text("the oven is cold\n")
    assert "was not built, since the oven is cold; with torch" in extension.load()[1]


def test_a_source_tree_says_how_to_build_in_it(package):
    make_source(package)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = extension.load()[1]
    assert str(package.parent) in reason and "python setup.py build_ext --inplace" in reason


def test_a_source_tree_in_front_of_an_installed_copy_warns(package, tmp_path, monkeypatch):
    make_source(package)
    install(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(package.parent), str(tmp_path / "site")])
    with pytest.warns(RuntimeWarning, match="run from another folder"):
        reason = extension.load()[1]
    assert str(package.parent) in reason and str(tmp_path / "site") in reason


def test_another_copy_without_the_extension_is_no_remedy(package, tmp_path, monkeypatch):
    make_source(package)
    install(tmp_path / "site")
    next((tmp_path / "site" / "atp_kernels").iterdir()).unlink()
    monkeypatch.setattr(sys, "path", [str(package.parent), str(tmp_path / "site")])
    assert "another folder" not in extension.load()[1]
