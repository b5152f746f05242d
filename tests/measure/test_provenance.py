"""What a result says of its origin."""

import re
import shlex
import subprocess
import sys

import pytest

from thintune.measure import provenance


@pytest.mark.parametrize(
    ("program", "shown"),
    [("/usr/bin/thintune", ["thintune"]), ("/x/thintune/__main__.py", ["python", "-m", "thintune"])],
)
def test_the_command_can_be_pasted_into_a_shell(program, shown, monkeypatch):
    words = ["train", "--model.options", '{"depth": 2}', "--out", "my run"]
    monkeypatch.setattr(sys, "argv", [program, *words])
    assert shlex.split(provenance.command()) == [*shown, *words]


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    found = provenance.git_commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)
    package = tmp_path / "site-packages"
    package.mkdir()
    (tmp_path / "mine.txt").write_text("")
    (package / "provenance.py").write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    subprocess.run([*git, "add", "mine.txt"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.git_commit() is None
    subprocess.run([*git, "add", "site-packages"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", provenance.git_commit())
