"""Runs one program in the child that was forked for it, the way ``python main.py`` would.

Standard library only; it runs inside the sandbox, after the locks are on. A program finds ``__name__ == "__main__"``,
its own source as ``main.py`` in the working directory (so that tracebacks show lines and ``inspect`` works), an empty
standard input, and modules as fresh as they were when the worker started. Tracebacks show the program's frames only.
"""

from __future__ import annotations

import atexit
import gc
import mmap
import os
import sys
import threading
from contextlib import suppress
from types import ModuleType
from typing import NoReturn

NAME = "main.py"
STARVED = 1


def _end(status: int) -> NoReturn:
    """Flush and leave, as CPython does: streams that the program closed or took away count for nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException:  # noqa: BLE001 - the stream may be the program's own, and raise anything
            status = status or 120  # what CPython exits with when it cannot flush
    os._exit(status)


def _exit_status(error: SystemExit) -> int:
    """What CPython makes of ``sys.exit(argument)``."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    with suppress(BaseException):  # printing runs code of the program's
        print(error.code, file=sys.stderr)
    return 1


def _report(error: BaseException) -> bool:
    """Print a traceback without the frames of this module, through the program's own hook if it set one.

    True if the program ended for want of memory.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        error.__traceback__ = trace
        sys.excepthook(type(error), error, trace)
    except MemoryError:
        with suppress(OSError):
            os.write(2, b"MemoryError\n")
        return True
    except BaseException as second:  # noqa: BLE001 - the program's own hook failed
        with suppress(OSError):
            os.write(2, f"Error in sys.excepthook: {type(second).__name__}\n".encode())
    return isinstance(error, MemoryError)


def run(source: bytes, hidden: list[str], note: mmap.mmap) -> NoReturn:
    """Run ``source`` as a script and end the process with the exit status that CPython would have given.

    ``hidden`` names modules that a program should not find loaded. ``note``, which the parent can read, gets
    ``STARVED`` as its first item if a MemoryError ended the program. (What is on stderr, a program may have printed.)
    """
    leader = os.getpid()
    reserve = bytearray(1 << 18)  # given back before a MemoryError is printed
    main = ModuleType("__main__")
    main.__dict__.update(__file__=NAME, __builtins__=__builtins__)
    for name in hidden:
        sys.modules.pop(name, None)
    sys.modules["__main__"] = main
    sys.argv[:] = [NAME]
    sys.path.insert(0, os.getcwd())
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    # Only tracebacks become poorer where the scratch folder is smaller than the source.
    with suppress(OSError), open(NAME, "wb") as file:
        file.write(source)
    gc.enable()
    status, starved = 0, False
    try:
        exec(compile(source, NAME, "exec"), main.__dict__)
    except SystemExit as error:
        status = _exit_status(error)
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its result
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        del reserve
        starved = _report(error)
    # As at the end of an interpreter: wait for threads, then run what was registered.
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except SystemExit as error:
        status, starved = _exit_status(error), False
    except BaseException as error:  # noqa: BLE001 - as above
        _report(error)
    if starved and os.getpid() == leader:  # a process that the program forked comes here, too
        note[0] = STARVED
    _end(status)
