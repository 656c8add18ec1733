"""The exit statuses of the command. Scripts rely on these numbers: they never change their meaning."""

from enum import IntEnum


class Exit(IntEnum):
    OK = 0
    JOB_FAILED = 1  #: the job failed or was cancelled; also a failed check of `doctor`, or an unexpected error
    USAGE = 2
    REJECTED = 3  #: the job succeeded, but its result missed a gate of the recipe
    REFUSED = 4  #: the API or the same check on this side refused the request, or the API could not be reached
    NOT_FOUND = 5
    LOCAL = 6  #: something on this machine: a file, the disk, a missing extra, bytes that differ
    OTHER_BYTES = 7  #: `reproduce`: every figure lies in its interval, but an artifact's bytes differ
    OTHER_FIGURES = 8  #: `reproduce`: a figure lies outside its interval, or the verdict differs
    NOT_AUTHENTIC = 9  #: `verify`: a signature is missing or wrong, or a file or figure differs from what was signed
    DETACHED = 130  #: Ctrl-C; a job that was waited for goes on


EPILOG = (
    "Exit status: 0 success · 1 the job failed or was cancelled · 2 wrong usage · 3 the result missed a gate · "
    "4 refused, or the API can't be reached · 5 not found · 6 a fault on this machine (file, disk, missing extra) · "
    "7 reproduced except for the bytes · 8 not reproduced · 9 not authentic · "
    "130 Ctrl-C (a job that was waited for goes on)."
)
