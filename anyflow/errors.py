"""Errors that a user can mend, and the exit codes that a scheduler reads."""

from __future__ import annotations

import errno

EXIT_USER = 2
"""The recipe, the arguments or the files are at fault: one sentence says what and how to mend it."""

EXIT_INTERRUPTED = 130
"""Ctrl-C: saved like a preemption."""

EXIT_PREEMPTED = 75
"""The run was told to stop (SIGTERM), saved itself and can go on: start it again with ``--resume auto``."""


class UserError(Exception):
    """A mistake of the user's: one sentence that names the field, the value and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class if there is no message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def explain(error: BaseException, place: str = "") -> str | None:
    """One sentence for a failure of the machine, or None for anything else: a programmer's mistake has a traceback.

    Args:
        error: what was raised; what it came from is looked at too, since libraries wrap what the system says.
        place: the folder that was written in, for errors that do not name their file.
    """
    for link in _chain(error):
        number = link.errno if isinstance(link, OSError) else None
        for numbers, words, what, remedy in _FAULTS:
            is_meant = number in numbers or any(word in str(link) for word in words)
            # a refusal that was dealt with, before something else went wrong, is no news
            if is_meant and (errno.EACCES not in numbers or link in (error, error.__cause__)):
                named = str(getattr(link, "filename", None) or "") or place
                return f"{what}{f' ({named})' if named else ''}: {remedy}"
        if "Failed to import diffusers" in str(link):
            root = _chain(error)[-1]
            return (
                f"diffusers cannot be imported, for a package that it uses is broken ({type(root).__name__}: "
                f"{first_line(root)}): install that one again, or uninstall it"
            )
    return None


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in links:
        links.append(cause)
        cause = cause.__cause__ or cause.__context__
    return links


_ELSEWHERE = "write elsewhere (--out, --to, run.out)"
_AGAIN = "a run goes on by --resume auto"
_FAULTS: tuple[tuple[tuple[int, ...], tuple[str, ...], str, str], ...] = (
    (
        (errno.ENOSPC,),
        ("No space left on device", "disk is full"),
        "the disk is full",
        f"free some space, or {_ELSEWHERE}; {_AGAIN}",
    ),
    (
        (errno.EDQUOT,),
        ("Disk quota exceeded",),
        "your disk quota is used up",
        f"delete something, or {_ELSEWHERE}; {_AGAIN}",
    ),
    (
        (errno.EFBIG,),
        ("File too large",),
        "a file would be larger than this shell allows",
        f"raise the limit (ulimit -f unlimited); {_AGAIN}",
    ),
    ((errno.EROFS,), ("Read-only file system",), "the disk is read-only", f"make it writable, or {_ELSEWHERE}"),
    (
        (errno.EACCES, errno.EPERM),
        ("Permission denied",),
        "permission is denied",
        f"change the owner or the rights, or {_ELSEWHERE}",
    ),
    (
        (errno.ENAMETOOLONG,),
        ("File name too long",),
        "a file's name would be too long",
        "give a shorter name (--out, --to, run.name)",
    ),
    ((errno.EIO,), (), "the disk reports an error", f"look at the disk (dmesg), or {_ELSEWHERE}; {_AGAIN}"),
    (
        (errno.EMFILE, errno.ENFILE),
        ("Too many open files",),
        "too many files are open",
        f"raise the limit (ulimit -n 65536); {_AGAIN}",
    ),
    (
        (),
        ("DataLoader worker (pid",),
        "a process that decodes clips was killed, most likely for want of memory",
        f"lower data.num_workers (0: none) or data.batch_size, or free memory; {_AGAIN}",
    ),
    (
        (),
        ("does not have a deterministic implementation",),
        "run.deterministic=true, and an operation has no deterministic kernel on this device",
        f"set run.deterministic=false; {_AGAIN}",
    ),
)
"""Numbers of the system and words of compiled libraries, what they mean, and the remedy."""
