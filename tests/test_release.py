"""Claims about `make release-check`: no release without a signed tag of its version, from a clean commit."""

import shutil
import subprocess

import pytest

from tests.release import problems


@pytest.fixture
def repository(tmp_path, monkeypatch):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen to sign with")
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    (tmp_path / "signers").write_text(f"me@here {(tmp_path / 'key.pub').read_text()}")
    settings = {
        "user.name": "me",
        "user.email": "me@here",
        "gpg.format": "ssh",
        "user.signingkey": f"{tmp_path}/key.pub",
    }
    for name, value in (settings | {"gpg.ssh.allowedSignersFile": f"{tmp_path}/signers"}).items():
        subprocess.run(["git", "config", "--global", name, value], check=True)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    (root / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## [1.2.0]\n")
    subprocess.run(["git", "add", "-A"], cwd=root, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "a"], cwd=root, check=True)
    return root


def tag(root, *words):
    subprocess.run(["git", "tag", *words, "-m", "a release", "v1.2.0"], cwd=root, check=True)


def test_a_signed_tag_of_the_version_on_a_clean_commit_is_a_release(repository):
    tag(repository, "--sign")
    assert problems(repository) == []


def test_everything_that_is_missing_is_told(repository):
    assert problems(repository) == ["there is no tag v1.2.0 on this commit. git tag --sign v1.2.0"]
    tag(repository, "--annotate")
    assert "is not signed" in problems(repository)[0]
    tag(repository, "--sign", "--force")
    (repository / "CHANGELOG.md").write_text("## [Unreleased]\n")
    found = " ".join(problems(repository))
    assert "files differ" in found and "no section 1.2.0" in found


def test_a_signature_of_a_stranger_is_told(repository, tmp_path):
    tag(repository, "--sign")
    (tmp_path / "signers").write_text("")
    assert "does not verify" in problems(repository)[0]
