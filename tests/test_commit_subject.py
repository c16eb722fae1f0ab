"""The commit-msg hook refuses a subject of more than 72 characters."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONFIG = yaml.safe_load((Path(__file__).resolve().parent.parent / ".pre-commit-config.yaml").read_text())
(HOOK,) = [hook for hook in CONFIG["repos"][0]["hooks"] if hook["id"] == "commit-subject"]


def test_the_hook_is_installed_with_the_others() -> None:
    assert "commit-msg" in CONFIG["default_install_hook_types"]
    assert HOOK["stages"] == ["commit-msg"]


@pytest.mark.parametrize(
    ("message", "accepted"),
    [
        ("x" * 72, True),
        ("x" * 73, False),
        ("×" * 72, True),
        ("×" * 73, False),
        ("Short\n\n" + "a body line may be longer " * 10, True),
        ("\n" + "x" * 73 + "\n\nbody", False),
    ],
)
def test_a_long_subject_is_refused(message: str, accepted: bool, tmp_path: Path) -> None:
    file = tmp_path / "message"
    file.write_text(message + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pre_commit.languages.pygrep", *HOOK["args"], HOOK["entry"], str(file)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert (outcome.returncode == 0) == accepted, outcome.stdout + outcome.stderr
