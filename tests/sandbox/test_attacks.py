"""Programs that try to get out, to stay, to take everything, or to spoil the next call. All must fail.

Each prints BREACH if it succeeds. After each, the same worker, not a new one, must run a program that looks for traces.
Nothing but this machine's loopback device is ever a network target.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

pytestmark = pytest.mark.sandbox

ANY = {"ok", "error", "time_limit", "memory_limit", "output_limit"}
SECRET = f"attack-target-{os.getpid()}"  # a test process beside this one lays out its own

# Looks for what an earlier program may have left, with the tools that it may have spoilt.
AFTER = """
import builtins, os, sys, sympy, math
assert os.listdir(".") == ["main.py"], os.listdir(".")
def seen(folder):
    try:
        return os.listdir(folder)
    except OSError:
        return []
others = [p for p in seen("/proc") if p.isdigit() and int(p) not in (1, os.getpid())]
assert not others, others
assert set(seen("/dev/shm")) <= {"main.py"}
assert len(seen("/proc/self/fd")) <= 4
assert not hasattr(builtins, "spoilt") and sympy.factorint(12) == {2: 2, 3: 1} and math.pi > 3
assert os.environ.get("SPOILT") is None
print(sympy.sqrt(8), len([1, 2]), sum([1, 2]))
"""

CONTAINED: dict[str, tuple[str, set[str]]] = {
    # Taking everything.
    "fork_bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"time_limit", "memory_limit"}),
    "forks_beyond_the_limit": (
        "import os, time\nn = 0\nfor _ in range(100):\n    try:\n        if os.fork() == 0: time.sleep(9)\n        n += 1\n"
        "    except OSError: break\nif n > 40: print('BREACH', n)",
        {"ok"},
    ),
    "thread_bomb": (
        "import threading, time\nfor i in range(500): threading.Thread(target=time.sleep, args=(9,)).start()\nprint('BREACH')",
        {"error", "time_limit"},
    ),
    "memory_in_one_piece": ("x = bytearray(2 << 30)\nprint('BREACH')", {"memory_limit"}),
    "memory_bit_by_bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", {"memory_limit", "time_limit"}),
    "memory_in_numpy": ("import numpy\nx = numpy.ones(1 << 28)\nprint('BREACH')", {"memory_limit"}),
    "memory_in_many_processes": (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        x = bytearray(os.urandom(1 << 20)) * 200\n        time.sleep(9)\ntime.sleep(9)",
        {"memory_limit", "time_limit"},
    ),
    "memory_shared_by_many_processes": (
        "import mmap, os, time\nblock = bytes(1 << 20)\nfor _ in range(3):\n    if os.fork() == 0:\n        m = mmap.mmap(-1, 200 << 20)\n"
        "        for i in range(200): m[i << 20:i + 1 << 20] = block\n        time.sleep(9)\ntime.sleep(9)",
        {"memory_limit"},
    ),
    "memory_in_a_mapping": ("import mmap\nm = mmap.mmap(-1, 2 << 30)\nprint('BREACH')", {"error", "memory_limit"}),
    "disk_one_file": ("with open('f', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))\nprint('BREACH')", {"error"}),
    "disk_many_files": (
        "for i in range(64):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(1 << 20))\nprint('BREACH' if NS else '')",
        {"error", "ok"},
    ),
    "disk_small_files": ("for i in range(5000): open(f'f{i}', 'w').close()\nprint('BREACH' if NS else '')", {"error", "ok"}),
    "deep_folders": (
        "import os\nfor i in range(400):\n    os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)", {"ok", "error"},
    ),
    "folder_nobody_may_enter": ("import os\nos.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)", {"ok"}),
    "dev_shm": (
        "with open('/dev/shm/f', 'wb') as f:\n    for _ in range(64): f.write(bytes(1 << 20))\nprint('BREACH')", {"error"},
    ),
    "stdout_100_mb": ("import sys\nfor _ in range(100): sys.stdout.write('x' * (1 << 20))", {"output_limit"}),
    "stderr_100_mb": ("import sys\nfor _ in range(100): sys.stderr.write('x' * (1 << 20))", {"output_limit"}),
    "stdout_for_ever_without_newline": ("while True: print(end='x')", {"output_limit"}),
    "huge_exception_message": ("raise ValueError('x' * 10_000_000)", {"output_limit"}),
    "cpu_spin": ("while True: pass", {"time_limit"}),
    "cpu_spin_in_c": ("x = 7 ** (10 ** 9)", {"time_limit", "memory_limit"}),
    "sleep_for_ever": ("import time\ntime.sleep(1e6)", {"time_limit"}),
    "regex_backtracking": ("import re\nre.match(r'(a+)+$', 'a' * 40 + 'b')", {"time_limit"}),
    "sympy_factorial": ("import sympy\nprint(sympy.factorial(10 ** 8) % 7)", {"time_limit", "memory_limit"}),
    "sympy_factorint": (
        "import sympy\nprint(sympy.factorint(sympy.nextprime(10**34) * sympy.nextprime(3 * 10**35)))", {"time_limit"},
    ),
    "sympy_power": ("import sympy\nprint(sympy.Integer(9) ** sympy.Integer(9) ** 9)", {"time_limit", "memory_limit", "error"}),
    "deep_recursion": ("import sys\nsys.setrecursionlimit(10**8)\ndef f(n): return f(n + 1) + 1\nf(0)", {"error", "memory_limit", "time_limit"}),
    "deep_nesting": ("exec('(' * 5000 + ')' * 5000)", {"error", "memory_limit"}),
    "many_descriptors": ("fs = [open('/dev/null') for _ in range(5000)]\nprint('BREACH')", {"error"}),
    "core_dump": ("import os, resource\nprint(resource.getrlimit(resource.RLIMIT_CORE))\nos.abort()", {"error"}),
    "segfault": ("import ctypes\nctypes.string_at(1)", {"error"}),
    # Staying.
    "ignores_sigterm_and_sigalrm": (
        "import signal, time\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: time.sleep(1)",
        {"time_limit"},
    ),
    "grandchild_holds_the_pipe": ("import subprocess\nsubprocess.Popen(['/bin/sleep', '60'])\nprint('done')", {"ok"}),
    "grandchild_in_a_session_of_its_own": (
        "import subprocess\nsubprocess.Popen(['/bin/sleep', '60'], start_new_session=True)\nprint('done')", {"ok"},
    ),
    "daemon": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: time.sleep(0.01)\n    os._exit(0)\nprint('done')",
        {"ok"},
    ),
    "daemons_that_keep_forking": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True:\n        if os.fork(): os._exit(0)\nprint('done')", {"ok"},
    ),
    "stopped_child": ("import os, signal\nif os.fork() == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\nprint('done')", {"ok"}),
    "dies_by_itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", {"error"}),
    "vanishes": ("import os\nos._exit(0)", {"ok"}),
    "exit_in_a_thread": ("import threading, os\nthreading.Thread(target=os._exit, args=(7,)).start()\nimport time; time.sleep(5)", {"error"}),
    "non_daemon_thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()", {"time_limit"}),
    # Harming the worker.
    "kill_everything": ("import os\ntry: os.kill(-1, 9)\nexcept OSError: pass", ANY),
    "kill_parent": ("import os\nfor n in (2, 9, 15, 19, 11, 6, 10):\n    try: os.kill(os.getppid(), n)\n    except OSError: pass", ANY),
    "kill_init": ("import os\nfor n in range(1, 65):\n    try: os.kill(1, n)\n    except OSError: pass", ANY),
    "kill_group_of_parent": ("import os\ntry: os.killpg(os.getpgid(os.getppid()), 9)\nexcept OSError: pass", ANY),
    "limits_of_the_parent": (
        "import os, resource\ntry:\n    resource.prlimit(os.getppid(), resource.RLIMIT_AS, (1, 1)); print('BREACH')\nexcept OSError: pass", {"ok"},
    ),
    "priority_of_the_parent": (
        "import os\nfor call in (lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19), lambda: os.sched_setaffinity(os.getppid(), {0})):\n"
        "    try:\n        call(); print('BREACH')\n    except OSError: pass", {"ok"},
    ),
    "limits_upward": (
        "import resource\nfor n in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):\n"
        "    try:\n        resource.setrlimit(n, (resource.RLIM_INFINITY,) * 2); print('BREACH')\n    except (OSError, ValueError): pass", {"ok"},
    ),
    "ptrace": (
        "import ctypes, os\nc = ctypes.CDLL(None, use_errno=True)\nif c.ptrace(16, os.getppid(), 0, 0) == 0: print('BREACH')", {"ok"},
    ),
    "memory_of_the_parent": (
        "import os\nfor name in ('mem', 'maps', 'environ', 'fd/0', 'root/etc', 'cwd'):\n    try:\n"
        "        os.listdir(f'/proc/{os.getppid()}/{name}') if name in ('root/etc', 'cwd') else open(f'/proc/{os.getppid()}/{name}', 'rb').read(1); print('BREACH', name)\n"
        "    except OSError: pass",
        {"ok"},
    ),
    "closes_all_descriptors": ("import os\nos.closerange(0, 9999)", ANY),
    "writes_to_all_descriptors": (
        "import os\nfor n in range(3, 4096):\n    try: os.write(n, b'\\x00\\x00\\x00\\x02{}' * 9); print('BREACH', n)\n    except OSError: pass", {"ok"},
    ),
    "binary_on_stdout": ("import os\nos.write(1, b'\\x00\\x00\\x00\\x10{\"status\": \"ok\"}' + bytes(range(256)))", {"ok"}),
    # The worker is told of output that is gone when it reads. Only where programs have ids of their own is that forbidden.
    "steals_its_own_output": (
        "import os, time\ntry: fds = [os.open(f'/proc/self/fd/{n}', os.O_RDONLY | os.O_NONBLOCK) for n in (1, 2)]\nexcept OSError:\n    if NS and not OWN_ID: raise\n    os._exit(0)\n"
        "for _ in range(3):\n    if os.fork() == 0:\n        while True:\n            for fd in fds:\n                try: os.read(fd, 1 << 16)\n                except OSError: pass\n"
        "end = time.time() + 0.9\nwhile time.time() < end:\n    os.write(2, b'x'); os.write(1, b'x')\n    time.sleep(0.0002)\ntime.sleep(99)",
        {"ok", "time_limit"},
    ),
    "spoils_modules": (
        "import builtins, sympy, os, math\nbuiltins.spoilt = 1; builtins.len = None; sympy.sqrt = None; math.pi = 0; os.environ['SPOILT'] = '1'\nsympy.S.Half.p = 7",
        ANY,
    ),
    "spoils_through_atexit": ("import atexit, os\natexit.register(lambda: open('left', 'w').write('x'))", {"ok"}),
    "broken_stdout": ("import sys\nsys.stdout = None\nsys.stderr = 7", ANY),
    "broken_excepthook": ("import sys\nsys.excepthook = None\n1/0", {"error"}),
    # Getting out.
    "etc_passwd": ("try: print('BREACH', open('/etc/passwd').read())\nexcept OSError: pass", {"ok"}),
    "etc_shadow": ("try: print('BREACH', open('/etc/shadow').read())\nexcept OSError: pass", {"ok"}),
    "etc_through_a_shell": ("import subprocess\nr = subprocess.run(['/bin/sh', '-c', 'cat /etc/passwd /etc/hostname; ls ~'], capture_output=True)\nif b'root' in r.stdout: print('BREACH')", {"ok", "error"}),
    "exec_of_a_shell": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'cat /etc/passwd && echo BREACH; exit 0'])", ANY),
    "host_environment": ("import os\nif SECRET in str(os.environ): print('BREACH')", {"ok"}),
    "environment_of_others": (
        "import os\nfor p in filter(str.isdigit, os.listdir('/proc') if NS else []):\n    try:\n        if SECRET in open(f'/proc/{p}/environ').read(): print('BREACH')\n    except OSError: pass",
        {"ok"},
    ),
    "processes_of_others": (
        "import os\nn = [p for p in os.listdir('/proc') if p.isdigit()] if NS else []\nif len(n) > 3: print('BREACH', n)", {"ok"},
    ),
    "work_tree": ("import os\ntry: print('BREACH', os.listdir(TREE))\nexcept OSError: pass", {"ok"}),
    "home": ("import os\ntry:\n    if set(os.listdir(HOST_HOME)) - {'.pyenv'}: print('BREACH', os.listdir(HOST_HOME))\nexcept OSError: pass", {"ok"}),
    "host_tmp": ("try: print('BREACH', open(MARKER).read())\nexcept OSError: pass", {"ok"}),
    "writing_outside": (
        "import os, sys, sympy\nfor place in ('/', '/usr', '/dev', '/proc', '/etc', '/packages', '/worker', os.path.dirname(sympy.__file__), os.path.dirname(os.__file__)):\n"
        "    try: open(place + '/left', 'w').close(); print('BREACH', place)\n    except OSError: pass",
        {"ok"},
    ),
    "writing_to_proc": (
        "for f in ('/proc/sys/kernel/hostname', '/proc/1/oom_score_adj', '/proc/sysrq-trigger', '/proc/sys/vm/overcommit_memory'):\n"
        "    try: open(f, 'w').write('1'); print('BREACH', f)\n    except OSError: pass",
        {"ok"},
    ),
    "symlink_tricks": (
        "import os\nfor t in ('/proc/1/root', '/proc/1/cwd', '/..', '/proc/self/root/../..'):\n    os.symlink(t, 'l')\n"
        "    for f in ('/etc/passwd', MARKER):\n        try: print('BREACH', open('l' + f).read())\n        except OSError: pass\n    os.unlink('l')",
        {"ok"},
    ),
    "hard_link": ("import os\ntry: os.link('/etc/passwd', 'p'); print('BREACH')\nexcept OSError: pass", {"ok"}),
    "network_loopback": (
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', PORT), 1); print('BREACH')\nexcept OSError: pass", {"ok"},
    ),
    "network_by_a_shell": (
        "import subprocess\nsubprocess.run(['/bin/bash', '-c', f'echo x > /dev/tcp/127.0.0.1/{PORT} && echo BREACH'], stderr=subprocess.DEVNULL)", {"ok", "error"},
    ),
    "names_do_not_resolve": (
        "import socket\ntry: print('BREACH' if socket.getaddrinfo('localhost.invalid', 80) else '')\nexcept OSError: pass", {"ok"},
    ),
    "abstract_socket": (
        "import socket\ntry:\n    s = socket.socket(socket.AF_UNIX); s.connect('\\0' + SECRET); print('BREACH')\nexcept OSError: pass", {"ok"},
    ),
    "netlink": ("import socket\ntry: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); print('BREACH')\nexcept OSError: pass", {"ok"}),
    "unshare": (
        "import ctypes\nc = ctypes.CDLL(None)\nfor f in (0x10000000, 0x20000, 0x10020000, 0x40000000):\n    if c.unshare(f) == 0: print('BREACH', f)", {"ok"},
    ),
    "clone_into_a_user_namespace": (
        "import ctypes, os\nc = ctypes.CDLL(None)\nr = c.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "if r == 0: os._exit(0)\nif r > 0: print('BREACH')",
        {"ok"},
    ),
    "mount": (
        "import ctypes\nc = ctypes.CDLL(None)\nif c.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0 or c.umount2(b'/proc', 2) == 0: print('BREACH')", {"ok"},
    ),
    "mknod": ("import os\ntry: os.mknod('d', 0o60600, os.makedev(8, 0)); print('BREACH')\nexcept OSError: pass", {"ok"}),
    "setuid": ("import os\nfor n in (0, 1, 2000, 65534):\n    try:\n        if n != os.getuid(): os.setuid(n); print('BREACH')\n    except OSError: pass", {"ok"}),
    "setuid_file": (
        "import os, shutil, subprocess\nshutil.copy('/usr/bin/id', 'i'); os.chmod('i', 0o6755)\nfor p in ('./i', '/usr/bin/su', '/bin/mount'):\n"
        "    r = subprocess.run([p], capture_output=True, stdin=subprocess.DEVNULL)\n    if b'euid=0' in r.stdout: print('BREACH')",
        {"ok", "error"},
    ),
    "capabilities": (
        "import os\nlines = open('/proc/self/status').read().splitlines() if NS else []\n"
        "if any(l.split()[1].strip('0') for l in lines if l.startswith(('CapPrm', 'CapEff', 'CapInh', 'CapAmb'))): print('BREACH')",
        {"ok"},
    ),
    "shared_memory": (
        "import ctypes\nc = ctypes.CDLL(None)\nif c.shmget(1234, 4096, 0o1666) >= 0 or c.memfd_create(b'x', 0) >= 0: print('BREACH')", {"ok"},
    ),
    "keyring": ("import ctypes\nif ctypes.CDLL(None).syscall(248, b'user', b'k', b'v', 1, -3) >= 0: print('BREACH')", {"ok"}),
    "chroot": ("import os\ntry: os.chroot('/tmp'); print('BREACH')\nexcept OSError: pass", {"ok"}),
    # Odd input.
    "reads_stdin": ("import sys\nassert sys.stdin.read() == ''\ntry: input()\nexcept EOFError: print('end')", {"ok"}),
    "nul_in_the_source": ("print(1)\0", {"error"}),
    "lone_surrogate": ("print('\ud800')", {"error"}),
    "line_ends_of_windows": ("x = 1\r\nif x:\r\n    print(x)\r\n", {"ok"}),
    "byte_order_mark": ("\ufeffprint('é')", {"ok"}),
    "one_megabyte_of_source": ("x = 1\n" * 170_000 + "print(x)", {"ok", "time_limit"}),
    "empty": ("", {"ok"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def bait(tmp_path_factory):
    """Things on this machine that programs must not reach."""
    marker = Path(os.environ.get("TMPDIR", "/tmp")) / f"{SECRET}-{os.getpid()}"
    marker.write_text("BREACH")
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0" + SECRET)
    abstract.listen()
    os.environ["CORE_TORL_ATTACK"] = SECRET
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield {
            "MARKER": str(marker),
            "PORT": listener.getsockname()[1],
            "TREE": str(Path(__file__).parents[2]),
            "HOST_HOME": os.path.expanduser("~"),
        }
        with pytest.raises(BlockingIOError):  # nobody called
            listener.accept()
    abstract.close()
    marker.unlink()
    del os.environ["CORE_TORL_ATTACK"]


HEAVY = {"fork_bomb", "daemons_that_keep_forking", "memory_bit_by_bit", "memory_in_many_processes", "sympy_factorial"}


@pytest.mark.parametrize(
    "attack", [pytest.param(a, marks=[pytest.mark.slow] if a in HEAVY else [], id=a) for a in CONTAINED]
)
def test_attack_is_contained_and_the_next_call_is_unharmed(locked, bait, attack):
    code, expected = CONTAINED[attack]
    names = {**bait, "SECRET": SECRET, "NS": locked.isolation["namespaces"], "OWN_ID": bool(locked.isolation["job_id"])}
    used = "".join(f"{name} = {value!r}\n" for name, value in names.items() if name in code)
    worker = locked.pids
    result = locked.submit(used + code).result(timeout=30)
    assert "BREACH" not in result.stdout + result.stderr.replace("print('BREACH", "")
    assert result.status in expected, result
    assert result.seconds < 4
    after = locked.submit(AFTER).result(timeout=30)
    assert (after.status, after.stdout) == ("ok", "2*sqrt(2) 2 3\n"), after
    assert locked.pids == worker
