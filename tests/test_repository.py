"""Facts about the repository as a whole: what may be committed, and who may import whom."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from calledshot.cli import VERBS

ROOT = Path(__file__).parents[1]
LIGHT_ROOMS = ["recipe", "rundir", "stats", "machine", "objective", "data", "experiment", "lab", "cli"]

# A folder of one machine: below the root, and not part of an address.
OWN_FOLDER = re.compile(r"(?<![\w.:/*])/(?:home|root|work|tmp|Users)/[\w.-]+")
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}|gh[opsu]_[A-Za-z0-9]{36}|github_pat_\w{30,}|AKIA[0-9A-Z]{16})\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    """The text of every file that git tracks, by its path."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout, so nothing says which files are committed")
    paths = [path for path in listing.stdout.split("\0") if path and (ROOT / path).is_file()]
    return {path: (ROOT / path).read_text(encoding="utf-8", errors="replace") for path in paths}


@pytest.mark.parametrize(("pattern", "what"), [(OWN_FOLDER, "a folder of one machine"), (TOKEN, "a secret")])
def test_no_committed_file_holds(committed: dict[str, str], pattern: re.Pattern[str], what: str) -> None:
    found = [
        f"{path}: {match.group()}" for path, text in committed.items() for match in list(pattern.finditer(text))[:1]
    ]
    assert not found, f"{what} was committed"


def test_the_patterns_know_what_they_look_for() -> None:
    for folder in ("home/ann", "tmp/x", "root/.cache"):
        assert OWN_FOLDER.search(f'open("/{folder}/file")')
    for address in ("https://example.org/home/ann", "./tmp/x", "../work/x", "/usr/share/tmp/x"):
        assert not OWN_FOLDER.search(address)
    for secret in ("hf_" + "a1" * 17, "sk-" + "proj-" + "b2" * 20, "gh" + "p_" + "c3" * 18, "AKIA" + "D4" * 8):
        assert TOKEN.search(f"token = '{secret}'")


def test_rooms_import_only_what_stands_before_them() -> None:
    """The contracts of import-linter in pyproject.toml."""
    command = [Path(sys.executable).parent / "lint-imports", "--no-logo", "--no-cache"]
    linted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("room", LIGHT_ROOMS)
def test_the_room_starts_without_torch(room: str) -> None:
    """What import-linter cannot see: that nothing heavy is imported on the way, by whomever."""
    program = f"import sys, calledshot.{room}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    started = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (started.stdout.strip(), started.returncode) == ("", 0), started.stderr


def test_verbs_in_the_documents_exist() -> None:
    """Every `shot VERB` that README and CONTRIBUTING set in code, and the make targets beside them."""
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL))
    verbs = set(re.findall(r"\bshot ([a-z]+)", code))
    assert verbs <= {verb for verb, _, _ in VERBS}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)", code))
    assert targets
    assert targets <= set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
