"""The kernel's locks, by plain system calls: capabilities, Landlock, seccomp. Standard library only.

This module runs inside the sandbox, in the child that is about to run a program. Three locks, each of which closes
what the others leave open:

- no capabilities and no way to gain them (``no_new_privs``),
- Landlock: files outside a list cannot be opened, written or executed, and no process outside can be traced,
- seccomp: calls that no mathematical program needs (sockets, mounts, tracing, shared memory that would outlive the
  program, changes to other processes) answer "operation not permitted".

What they do not guard against: a bug in the kernel itself, and side channels such as the time that a call takes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable
from contextlib import suppress

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    """A system call by its number. Raises OSError."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide), f"system call {number}")


def prctl(option: int, value: int | ctypes.c_void_p, third: object = 0) -> None:
    """Raises OSError."""
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in (value, third)]
    _check(_libc.prctl(option, *wide, ctypes.c_ulong(0), ctypes.c_ulong(0)), f"prctl {option}")


def unshare(flags: int) -> None:
    """Raises OSError where the kernel does not allow these namespaces."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Raises OSError."""
    words = [None if w is None else os.fsencode(w) for w in (source, target, kind, data)]
    result = _libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    _check(result, f"mount {source} on {target}")


def unmount(target: str) -> None:
    """Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount {target}")


def drop_capabilities() -> None:
    """Give up every capability for good. Raises OSError."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3: two words per set
    _check(_libc.capset(header, bytes(24)), "capset")


# Landlock. Rights by the bit of the kernel's ABI; the number behind a set is the ABI version that knows it.
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REFER, _TRUNCATE, _IOCTL = 1, 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
_RIGHTS = {1: (1 << 13) - 1, 2: _REFER, 3: _TRUNCATE, 5: _IOCTL}
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_SCOPES = 3  # abstract sockets and signals stay inside
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446


def landlock_abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    with suppress(OSError):
        return syscall(LANDLOCK_CREATE_RULESET, 0, 0, 1)
    return 0


def landlock(abi: int, readable: Iterable[str], writable: Iterable[str]) -> None:
    """From here on this process opens nothing but files below these paths; those that do not exist are passed over.

    Raises OSError if the kernel refuses.
    """
    handled = sum(rights for version, rights in _RIGHTS.items() if version <= abi)
    attributes = struct.pack("=QQQ", handled, 0, _SCOPES if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    rules = syscall(LANDLOCK_CREATE_RULESET, attributes, size, 0)
    try:
        for paths, rights in ((readable, _READ), (writable, handled)):
            for path in paths:
                try:
                    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                allowed = rights & handled & (-1 if os.path.isdir(path) else _ON_FILES)
                try:
                    syscall(LANDLOCK_ADD_RULE, rules, 1, struct.pack("=Qi", allowed, place), 0)
                finally:
                    os.close(place)
        syscall(LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


# Numbers on x86-64 and on arm64; -1 where a call does not exist.
_DENIED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "process_madvise": (440, 440),
    "move_pages": (279, 239), "migrate_pages": (256, 238), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "setns": (308, 268),
    "unshare": (272, 97), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "fanotify_init": (300, 262),
    "socket": (41, 198), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "personality": (135, 92),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "acct": (163, 89), "quotactl": (179, 60), "syslog": (103, 116), "iopl": (172, -1), "ioperm": (173, -1),
    "modify_ldt": (154, -1), "vhangup": (153, 58), "lookup_dcookie": (212, 18),
}  # fmt: skip
# Allowed on oneself (first argument 0) only.
_ON_ONESELF = {
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_SIGNALS = ((62, 129), (200, 130), (234, 131))  # kill, tkill, tgkill
_NAMESPACES = 0x7E020080
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW = 0x7FFF0000


def _fail(number: int) -> int:
    return 0x50000 | number


def seccomp_filter(signals: bool) -> bytes | None:
    """The program for the kernel; None on a processor whose numbers this module does not know.

    Without ``signals`` a process may signal nobody but itself: for kernels in which nothing else keeps a program from
    signalling processes that are not its own. (The kernel knows calls by number, hence the tables.)
    """
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return None
    column, audit = machine
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, _fail(errno.EPERM)),  # calls in another processor's numbering, e.g. 32-bit ones
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 numbering
        (_RETURN, 0, 0, _fail(errno.EPERM)),
    ]
    for numbers in _DENIED.values():
        if numbers[column] >= 0:
            code += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _fail(errno.EPERM))]
    # glibc falls back to clone, whose flags can be read here; those of clone3 lie in memory.
    code += [(_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _fail(errno.ENOSYS))]
    clone = [(_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _NAMESPACES), (_RETURN, 0, 0, _fail(errno.EPERM))]
    code += [(_EQUAL, 0, 4, _CLONE[column]), *clone, (_RETURN, 0, 0, _ALLOW)]
    own = {numbers[column] for numbers in _ON_ONESELF.values()}
    for number in own:
        only_self = [(_LOAD, 0, 0, 16), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _fail(errno.EPERM))]
        code += [(_EQUAL, 0, 4, number), *only_self, (_RETURN, 0, 0, _ALLOW)]
    if not signals:
        for numbers in _SIGNALS:
            only_self = [(_LOAD, 0, 0, 16), (_EQUAL, 1, 0, os.getpid()), (_RETURN, 0, 0, _fail(errno.EPERM))]
            code += [(_EQUAL, 0, 4, numbers[column]), *only_self, (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def seccomp(program: bytes) -> None:
    """Install a filter for this process and all that it starts. Raises OSError; needs ``no_new_privs``."""
    buffer = ctypes.create_string_buffer(program, len(program))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    prctl(PR_SET_SECCOMP, 2, ctypes.cast(head, ctypes.c_void_p))
