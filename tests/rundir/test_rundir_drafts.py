"""Drafts of folders: there under their name when they are whole, and cleared away by the next one when killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calledshot.rundir.drafts import draft_folder

PROGRAM = """
import sys, time
from pathlib import Path
from calledshot.rundir.drafts import draft_folder
with draft_folder(Path(sys.argv[1])) as draft:
    (draft / "half").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process in the middle of a draft of `tmp_path / "place"`."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "place")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait()


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def test_what_is_renamed_stays_and_nothing_else(tmp_path):
    with draft_folder(tmp_path / "new" / "place") as draft:
        (draft / "file").write_text("x")
        draft.rename(tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place" / "file").exists()
    with pytest.raises(KeyError), draft_folder(tmp_path / "new" / "other") as draft:
        raise KeyError
    assert os.listdir(tmp_path / "new") == ["place"]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path, other):
    (tmp_path / ".place.mine.tmp").mkdir()  # not one of ours
    (theirs,) = [name for name in hidden(tmp_path) if name != ".place.mine.tmp"]
    with draft_folder(tmp_path / "place"):
        assert len(hidden(tmp_path)) == 3
    assert (tmp_path / theirs / "half").exists()
    other.send_signal(signal.SIGKILL)
    other.wait()
    with draft_folder(tmp_path / "elsewhere"):
        pass
    assert theirs in hidden(tmp_path)
    with draft_folder(tmp_path / "place"):
        assert theirs not in hidden(tmp_path)
    assert hidden(tmp_path) == [".place.mine.tmp"]
