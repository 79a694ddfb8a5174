"""The command `shot`. Verbs are a table of import strings, so that help answers without importing what they need."""

import difflib
import errno
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, UnknownCommandError

from calledshot import __version__
from calledshot.recipe.errors import ShotError

HELP = """A pretraining lab for small teams.

Call the result, take the shot, keep it alive, report it honestly."""

VERBS: tuple[tuple[str, str, str], ...] = (
    ("demo", "calledshot.cli.demo:demo", "A small model on this interpreter's standard library, in minutes."),
    ("doctor", "calledshot.cli.doctor:doctor", "What this machine is, what it lacks, and what would fix it."),
    ("recipe", "calledshot.cli.recipe:app", "List, show, check, size up and compare recipes."),
    ("data", "calledshot.cli.data:app", "Prepare data, look at what is in them, see what the model sees."),
    ("train", "calledshot.cli.train:train", "Train a recipe, or go on with the run of that name."),
    ("resume", "calledshot.cli.train:resume", "Go on with an interrupted run."),
    ("profile", "calledshot.cli.profile:profile", "Where a training step's time goes, and what would gain how much."),
    ("checkpoint", "calledshot.cli.checkpoint:app", "List, verify, delete and merge a run's checkpoints."),
    ("eval", "calledshot.cli.evaluate:eval_", "Loss, perplexity and bits per byte of held-out documents or any text."),
    ("generate", "calledshot.cli.use:generate", "Complete a text."),
    ("chat", "calledshot.cli.use:chat", "Talk to a model."),
    ("serve", "calledshot.cli.use:serve", "Serve a model over HTTP, as OpenAI's API has it."),
    ("convert", "calledshot.cli.convert:app", "Make a run with experts, fewer key heads or more context of another."),
    ("import", "calledshot.cli.convert:import_", "Make a run of a Llama, Qwen3, Qwen3-MoE, Mixtral or T5 folder."),
    ("export", "calledshot.cli.convert:export", "Write a run's model as a Hugging Face folder."),
    ("ablate", "calledshot.cli.ablate:ablate", "Train the arms of a suite, matched, and compare them."),
    ("runs", "calledshot.cli.lab:runs", "The runs of this lab: state, progress, losses, speed."),
    ("diff", "calledshot.cli.lab:diff", "Two runs side by side: recipe, environment, result."),
    ("note", "calledshot.cli.lab:note", "Write a note on a run, tag it, or put it away."),
    ("report", "calledshot.cli.lab:report", "One self-contained HTML file about one or more runs."),
)
"""Verb, `module:attribute` of its function or `App`, and its line in the help. The order is that of the help."""

MACHINE_SAYS_NO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the operating system refuses for reasons that are no bug of ours, told in one line."""
SPIN_COUNT = "1000"
"""How long a thread of libgomp waits awake for the others. Its own default lasts long enough to hold up, on a machine
that does anything else besides, the thread that has the work: a training step beside one busy process takes 1.5 times
as long with it. On an idle machine there is no difference (docs/notebook.md)."""
INTERRUPTED = 130
BROKEN_PIPE = 141


def command() -> App:
    """The whole command line, with every verb still unimported."""
    app = App(
        name="shot", help=HELP, version=__version__, result_action="return_value", suppress_keyboard_interrupt=False
    )
    app["--help"].group = app["--version"].group = "Options"
    for place, (verb, target, line) in enumerate(VERBS):
        app.command(target, name=verb, help=line, sort_key=place)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (of `sys.argv`, or of `arguments`) and give its exit code: 0, 1 failed, 2 usage, 75 requeue, 130
    interrupted. What it says goes to stdout, errors in one line to stderr."""
    if "OMP_WAIT_POLICY" not in os.environ:  # read once, when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command()(tokens, print_error=False, exit_on_error=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except ShotError as error:
        return complain(str(error), error.exit_code)
    except UnknownCommandError as error:
        return complain(unknown_verb(error), 2)
    except CycloptsError as error:
        return complain(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in MACHINE_SAYS_NO:
            raise
        drop_stdout()
        return complain(f"{error.filename or 'output'}: {error.strerror}", 1)


def drop_stdout() -> None:
    """Send what is left in stdout's buffer nowhere: it cannot be written, and Python would complain again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str, code: int) -> int:
    """One line on stderr; gives `code` back."""
    print(f"shot: {message}", file=sys.stderr)
    return code


def unknown_verb(error: UnknownCommandError) -> str:
    """What to say about a mistyped verb, without importing the others as cyclopts would."""
    typed = (error.unused_tokens or [""])[0]
    group = " ".join(error.command_chain or ())
    known = [name for name in (error.app or command()) if not name.startswith("-")]
    near = difflib.get_close_matches(typed, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"no verb {typed!r}{f' in {group}' if group else ''}; {hint}"
