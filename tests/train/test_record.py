"""What a record says of its run."""

import re
import shlex
import subprocess
import sys

import pytest

from thintune.config import from_dict
from thintune.train import run


def test_what_was_not_measured_is_null(tiny, thintune, record, tmp_path):
    assert thintune("train", *tiny, "--train.max_steps", "1", "--out", tmp_path)[0] == 0
    found = record(tmp_path)
    assert found["steps"] == 1 and found["schema_version"] == 1
    for name in ("step_time_s_median", "step_time_s_iqr", "images_per_s", "explained_variance", "model_checkpoint"):
        assert found[name] is None, name
    measured = [k for k, v in found.items() if k.endswith(("_bytes", "_s", "per_step", "per_s")) and v is not None]
    assert {"peak_rss_bytes", "train_flops_per_step", "saved_activation_bytes", "checkpoint_bytes"} < set(measured)
    assert all(found[name] > 0 for name in measured)
    assert from_dict(found["config"]).train.max_steps == 1
    assert {"python", "torch", "timm", "thintune"} <= found["versions"].keys()


@pytest.mark.parametrize(
    ("program", "shown"),
    [("/usr/bin/thintune", ["thintune"]), ("/x/thintune/__main__.py", ["python", "-m", "thintune"])],
)
def test_the_command_can_be_pasted_into_a_shell(program, shown, monkeypatch):
    words = ["train", "--model.options", '{"depth": 2}', "--out", "my run"]
    monkeypatch.setattr(sys, "argv", [program, *words])
    assert shlex.split(run._command()) == [*shown, *words]


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    found = run._git_commit()
    assert found is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found)
    package = tmp_path / "site-packages"
    package.mkdir()
    (tmp_path / "mine.txt").write_text("")
    (package / "run.py").write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    subprocess.run([*git, "add", "mine.txt"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    monkeypatch.setattr(run, "__file__", str(package / "run.py"))
    assert run._git_commit() is None
    subprocess.run([*git, "add", "site-packages"], check=True)
    assert re.fullmatch(r"[0-9a-f]{40}-dirty", run._git_commit())
