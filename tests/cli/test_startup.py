"""`shot` answers at once, imports nothing heavy for it, and shows one frozen surface."""

import os
import subprocess
import sys
import time

import pytest
from cyclopts import App

from calledshot.cli import VERBS, command, main

HEAVY = {"torch", "transformers", "numpy", "scipy", "tokenizers", "starlette", "jinja2", "pyarrow", "huggingface_hub"}

COMMANDS = """
ablate
chat
checkpoint average
checkpoint consolidate
checkpoint list
checkpoint prune
checkpoint verify
convert extend
convert kv-heads
convert upcycle
data build
data inspect
data show
demo
diff
doctor
eval
export
generate
import
note
profile
recipe check
recipe diff
recipe keys
recipe list
recipe memory
recipe show
report
resume
runs
serve
train
"""


def commands(app: App, path: tuple[str, ...] = ()) -> set[str]:
    """Every command that runs something."""
    verbs = {name: sub for name, sub in app.resolved_commands().items() if not name.startswith("-")}
    if not verbs:
        return {" ".join(path)}
    return set().union(*(commands(sub, (*path, name)) for name, sub in verbs.items()))


def test_the_commands_are_these():
    """The public surface: adding a command is a decision, so `COMMANDS` is edited by hand, as is `VERBS`."""
    assert commands(command()) == {line for line in COMMANDS.split("\n") if line}


@pytest.mark.parametrize("line", ["--help", "recipe show demo --json", "recipe list", "--version"])
def test_answers_within_a_second_without_torch(line):
    script = (
        "import sys\n"
        "from calledshot.cli import main\n"
        f"code = main({line.split()!r})\n"
        "print(code, *{name.split('.')[0] for name in sys.modules}, file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    code, *modules = done.stderr.split()
    assert code == "0" and done.stdout
    assert not HEAVY & set(modules)
    assert min(seconds) < 1


def test_help_describes_every_verb_without_importing_any():
    script = (
        "import sys\n"
        "from calledshot.cli import main\n"
        "main(['--help'])\n"
        "print(*[name for name in sys.modules if name.startswith('calledshot.')], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for verb, target, line in VERBS:
        assert verb in done.stdout and line.split()[0] in done.stdout
        assert target.split(":")[0] not in done.stderr.split()


def test_module_and_command_are_the_same():
    module = subprocess.run([sys.executable, "-m", "calledshot", "--version"], capture_output=True, text=True)
    assert (module.returncode, module.stdout.strip()) == (0, "0.1.0")
    wrong = subprocess.run([sys.executable, "-m", "calledshot", "recip"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", "shot: no verb 'recip'; did you mean recipe?\n")


def test_bare_shot_prints_help(capsys):
    assert main([]) == 0
    assert "Usage: shot" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["rec"], "no verb 'rec'"),
        (["recipe", "sho"], "no verb 'sho' in recipe; did you mean show?"),
        (["--hlep"], "--hlep"),
        (["recipe", "show"], "RECIPE"),
        (["recipe", "list", "demo"], "demo"),
    ],
)
def test_prefixes_and_typos_are_not_guessed_at(line, said, capsys):
    assert main(line) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shot: ") and captured.err.count("\n") == 1
    assert said in captured.err


def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "calledshot", "recipe", "keys"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_output_that_cannot_be_written_is_said_in_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "calledshot", "recipe", "keys"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "shot: output: No space left on device\n")


def test_ctrl_c_answers_130(monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calledshot.cli.recipe.presets", interrupted)
    assert main(["recipe", "list"]) == 130
    assert capsys.readouterr().err == "shot: interrupted\n"
