"""Claims about `make audit`: no license outside the list comes in unseen."""

import pytest

from tests.audit import audit_vulnerabilities, dependencies, is_allowed, license_of


class Package:
    def __init__(self, **facts):
        self.metadata = self
        self.facts = facts

    def get(self, name):
        return self.facts.get(name.replace("-", "_"))

    def get_all(self, name):
        return self.facts.get(name)


def test_every_dependency_that_is_installed_is_found_with_an_allowed_license():
    found = {one.name: one for one in dependencies()}
    assert {"torch", "transformers", "diffusers", "peft", "trl", "datasets", "pyarrow", "markupsafe"} <= set(found)
    assert not [one for one in found.values() if not is_allowed(one.license)]
    assert "modeling-pisces" not in found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("MIT", True),
        ("MIT AND Apache-2.0 WITH LLVM-exception", True),
        ("GPL-3.0-only OR MIT", True),
        ("(MIT OR GPL-2.0-only)", True),
        ("MIT AND GPL-3.0-or-later", False),
        ("AGPL-3.0-only", False),
        ("CC-BY-NC-4.0", False),
        ("proprietary", False),
        ("", False),
    ],
)
def test_only_listed_licenses_are_allowed(expression, expected):
    assert is_allowed(expression) is expected


def test_a_license_is_read_from_any_of_its_three_places():
    assert license_of(Package(License_Expression="MIT", License="GPL")) == "MIT"
    assert license_of(Package(Classifier=["License :: OSI Approved :: BSD License"], License="x" * 900)) == "BSD"
    assert license_of(Package(License="Apache 2.0 License")) == "Apache-2.0"
    assert license_of(Package(Classifier=["License :: OSI Approved :: GNU General Public License v3 (GPLv3)"])) == (
        "GNU General Public License v3 (GPLv3)"
    )
    assert license_of(Package(License="x" * 900)) == ""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("echo 'No known vulnerabilities found'", (True, "No known")),
        ("echo 'torch 1.0 PYSEC-1'; exit 1", (False, "PYSEC-1")),
        ("echo 'ConnectionError: name not known' >&2; exit 1", (True, "NOT checked")),
    ],
)
def test_no_data_is_said_and_a_finding_fails(tmp_path, program, expected, monkeypatch):
    import sys

    path = tmp_path / "pip-audit"
    path.write_text(f"#!/bin/sh\ncat > /dev/null\n{program}\n")
    path.chmod(0o755)
    is_safe, words = audit_vulnerabilities(str(path), sys.executable)
    assert is_safe is expected[0] and expected[1] in words
