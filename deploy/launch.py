"""Becomes another program, if need be as another user, that the kernel ends when its parent dies.

``python -I -S launch.py PARENT SIGNAL UID GID PROGRAM [ARG …]``, UID and GID -1 for the caller's own. A separate
program rather than ``preexec_fn``: nothing of ours runs between fork and exec, so threads in the parent do no harm.
"""

from __future__ import annotations

import ctypes  # before the change of user: the interpreter may lie where that user cannot read
import os
import sys

PR_SET_PDEATHSIG = 1


def main(args: list[str]) -> int:
    parent, death_signal, uid, gid = (int(arg) for arg in args[:4])
    program = args[4:]
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    try:
        if uid >= 0:
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
        if libc is not None:
            # After setuid, which clears it; and the parent may have died before it was set.
            if libc.prctl(PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
            if os.getppid() != parent:
                return 1
        os.execv(program[0], program)
    except OSError as error:
        user = "" if uid < 0 else f" as user {uid}"
        print(f"cannot run {program[0]}{user}: {error.strerror}", file=sys.stderr)
        return 126


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
