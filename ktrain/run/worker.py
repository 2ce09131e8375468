"""Runs a user's script as one worker: `python -u -m ktrain.run.worker --parent PID SCRIPT ARGS`.

The script sees what `python SCRIPT ARGS` would show it. Around it: the worker dies with its supervisor, dumps its
stacks on a crash, maps ktrain's errors to the exit codes of the contract, and leaves an error file in torch's form.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import io
import json
import os
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from ktrain import native
from ktrain.base import contract, settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.base.exits import exit_code
from ktrain.errors import ConfigError, KtrainError

_WRITE_OUT_S = 10.0  # for open files of a script that ends


def die_with_parent(expected_pid: int) -> None:
    """Ends this process when its parent dies, or now if that has happened already."""
    native.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != expected_pid:
        os._exit(contract.EXIT_FAILED)


def error_report(error: BaseException) -> dict[str, object]:
    """The error in the form of torch's error files, with ktrain's kind beside it."""
    kind = error.kind if isinstance(error, KtrainError) else "exception"
    text = "".join(traceback.format_exception(error))
    message = f"{type(error).__name__}: {error}"
    extra = {"py_callstack": text, "timestamp": str(int(SYSTEM_CLOCK.wall()))}
    return {"message": {"message": message, "extraInfo": extra}, "kind": kind}


def _write_error_file(error: BaseException) -> None:
    path = settings.env("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        Path(path).write_text(json.dumps(error_report(error)))


def _frames_of_script(error: BaseException) -> TracebackType | None:
    """The traceback without the frames of this module and of runpy, which say nothing to the user."""
    own = {__file__, runpy.__file__, "<frozen runpy>"}
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_code.co_filename in own:
        tb = tb.tb_next
    return tb


def run_script(script: str, args: list[str]) -> int:
    """Runs the script as `__main__`; returns the exit code unless the script leaves by SystemExit."""
    sys.argv = [script, *args]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        if not Path(script).is_file():
            raise ConfigError(f"script {script!r}: there is no such file in {os.getcwd()}; name a Python file")
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 -- top of the process: every end leaves an error file
        _write_error_file(error)
        traceback.print_exception(type(error), error, _frames_of_script(error) or error.__traceback__)
        sys.stderr.flush()
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else exit_code(error)
    return contract.EXIT_OK


def _code_of(stop: SystemExit) -> int:
    """What the interpreter would make of it: a text is for people, and a failure."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or contract.EXIT_OK
    sys.stderr.write(f"{stop.code}\n")
    return contract.EXIT_FAILED


def leave(code: int) -> NoReturn:
    """Ends this process in order, but does not take the interpreter down.

    Taking it down can abort a process whose work is done: up to Python 3.13 a thread that then wants the interpreter is
    ended by unwinding its stack, and C++ code on it ends the process by SIGABRT. So do threads of gloo that let go of a
    tensor, and others that come back from native code (pytorch/pytorch#38228 and #190489, python/cpython#87135).

    Threads that are not daemons are waited for, exit handlers run, what was dropped is finalised, and open files are
    written out. Objects that still live are not finalised, which Python promises to nobody.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # both as multiprocessing ends its children
        atexit._run_exitfuncs()
        gc.collect()
        writes = threading.Thread(target=_write_out, daemon=True)  # another may stand in a write and hold its lock
        writes.start()
        writes.join(_WRITE_OUT_S)
    except BaseException:  # noqa: BLE001 -- shown, as the interpreter does: the work was done before
        traceback.print_exc()
    finally:
        os._exit(code)


def _write_out() -> None:
    """Writes out what open files still hold."""
    for each in gc.get_objects():
        if issubclass(type(each), io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):  # __class__ runs code
            try:
                each.flush()
            except Exception:  # noqa: BLE001, S110 -- closed, detached, or a stream of somebody's own that fails
                pass
    ctypes.CDLL(None).fflush(None)


def main(argv: list[str]) -> int:
    option, parent, script, *args = argv
    assert option == "--parent", option
    die_with_parent(int(parent))
    os.dup2(1, 2)  # one log for both streams: torch's redirection would open the file twice and overwrite itself
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # the supervisor asks for stacks before it ends a hang
    try:
        return run_script(script, args)
    except SystemExit as stop:
        return _code_of(stop)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
