"""`nightpress`: the command line. Each module beside this one adds its commands; errors become sentences here."""

import os
import sys
from typing import Annotated

import typer
from pydantic import ValidationError

from nightpress.client.cli import (
    audit,
    convert,
    cost,
    credentials,
    datasets,
    deliveries,
    demo,
    doctor,
    jobs,
    keys,
    login,
    mcp,
    models,
    output,
    press,
    profile,
    proof,
    queues,
    recipes,
    results,
    schedules,
    servers,
    stack,
    studies,
    tenants,
    verify,
    web,
    webhooks,
    whoami,
    workers,
)
from nightpress.client.cli.exits import EPILOG, Exit
from nightpress.client.errors import ApiError, ClientError, TransferError, UnreachableError
from nightpress.core.errors import ErrorCode, NightpressError
from nightpress.core.version import VERSION

app = typer.Typer(
    name="nightpress",
    help="Press Transformer models smaller and faster overnight, and prove what that did.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,  # boxes and colours for eyes, plain lines for pipes
)
for part in (
    jobs,
    results,
    verify,
    deliveries,
    proof,
    cost,
    schedules,
    studies,
    recipes,
    models,
    datasets,
    workers,
    queues,
    webhooks,
    credentials,
    login,
    whoami,
    keys,
    tenants,
    audit,
    stack,
    servers,
    web,
    press,
    convert,
    profile,
    mcp,
    doctor,
    demo,
):
    part.add_to(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"nightpress {VERSION}\n")
        raise typer.Exit(Exit.OK)


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Press Transformer models smaller and faster overnight, and prove what that did."""
    del version  # its callback has printed it


def main() -> None:
    """Run the command. Every error becomes a sentence, a hint and an exit status."""
    try:
        app(prog_name="nightpress")
    except BrokenPipeError:
        # The reader of the output is gone, e.g. `head`. Without a new stdout, Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(Exit.OK)
    except Exception as error:
        if os.environ.get("NIGHTPRESS_DEBUG"):
            raise
        sys.exit(explain(error))


def explain(error: Exception) -> Exit:
    """Print an error to standard error and return the exit status."""
    match error:
        case ApiError():
            output.fail(f"{error.message}{_list_faults(error.errors)}", error.hint, reference=error.request_id)
            return Exit.NOT_FOUND if error.code == ErrorCode.NOT_FOUND else Exit.REFUSED
        case UnreachableError():
            output.fail(error.message, error.hint)
            return Exit.REFUSED
        case TransferError() | ClientError():
            output.fail(error.message, error.hint)
            return Exit.LOCAL
        case NightpressError():
            output.fail(f"{error.message}{_list_faults(error.details.get('faults', []))}", error.hint)
            if error.code == ErrorCode.NOT_FOUND:
                return Exit.NOT_FOUND
            if error.code == ErrorCode.NOT_AUTHENTIC:
                return Exit.NOT_AUTHENTIC
            return Exit.REFUSED if error.kind.status < 500 else Exit.JOB_FAILED
        case ValidationError():
            faults = [{"at": ".".join(map(str, fault["loc"])), "problem": fault["msg"]} for fault in error.errors()]
            output.fail(
                f"Some values are not valid.{_list_faults(faults)}",
                "Settings come from NIGHTPRESS_* variables and .env.",
            )
            return Exit.USAGE
        case TimeoutError() if not error.errno:
            output.fail(str(error), "`nightpress doctor` looks for what may be wrong.")
            return Exit.JOB_FAILED
        case OSError():
            where = f" {error.filename}" if error.filename else ""
            output.fail(
                f"{error.strerror or error}{where}.",
                "Check that the path is right, that the disk has room, and that you may write there.",
            )
            return Exit.LOCAL
        case _:
            output.fail(
                f"An unexpected error happened in this command: {type(error).__name__}: {error}",
                "This is a bug. Please report it with the output of the same command after NIGHTPRESS_DEBUG=1.",
            )
            return Exit.JOB_FAILED


def _list_faults(faults: list[dict[str, str]]) -> str:
    """The invalid fields and what is wrong with each, a line for each."""
    return "".join(
        f"\n  {fault.get('at') or fault.get('loc', '')}: {fault.get('problem') or fault.get('msg', '')}"
        for fault in faults
    )


if __name__ == "__main__":
    main()
