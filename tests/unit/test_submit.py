"""How a command that runs a job ends: the exit code is the job's, and what stops the command stops the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spark_fs.errors import ExitCode, summary, translate
from spark_fs.submit import SubmitCommand

#: A command that says when its job runs; the job takes a minute if nobody stops it.
COMMAND = """\
import sys
from spark_fs import console
from spark_fs.submit import SubmitCommand

job = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
sys.exit(console.run(lambda: SubmitCommand((sys.executable, "-c", job)).run()))
"""


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_the_exit_code_is_that_of_the_job_as_a_shell_gives_it(script: str, code: int) -> None:
    """What a signal has ended is 128 and the signal's number."""
    assert SubmitCommand(("sh", "-c", script)).run() == code


def test_sigterm_ends_the_job_too() -> None:
    """Sent to the command alone, as a scheduler does: the job gets it, and the exit code says so."""
    with subprocess.Popen([sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        job = int(command.stdout.readline())
        os.kill(command.pid, signal.SIGTERM)
        assert command.wait(timeout=30) == ExitCode.TERMINATED
    assert not Path(f"/proc/{job}").exists()


#: A command that is stopped, at its work or in the middle of a run over several views.
STOPPED = """\
import os, sys
from spark_fs import console
from spark_fs.errors import InterruptedRunError

def work():
    os.kill(os.getpid(), {signal})

def views():
    try:
        work()
    except KeyboardInterrupt as stop:
        raise InterruptedRunError([], []) from stop

sys.exit(console.run({act}))
"""


@pytest.mark.parametrize("act", ["work", "views"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGINT, ExitCode.INTERRUPTED)])
def test_a_command_without_a_job_ends_by_sigterm_as_by_control_c(sent: signal.Signals, code: ExitCode, act: str) -> None:
    """It says that what was finished is kept, and gives its own code for each."""
    script = STOPPED.format(signal=int(sent), act=act)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(";")[0]) == (code, "Interrupted")


def test_an_error_whose_text_went_with_the_jvm_is_named_by_its_class() -> None:
    """Spark's errors ask the JVM for their text; a run that is noted as failed must not fail by that."""

    class JvmError(Exception):
        def __str__(self) -> str:
            raise ConnectionRefusedError

    assert translate(JvmError()) is None
    assert summary(JvmError()) == "JvmError"
