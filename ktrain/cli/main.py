"""`ktrain`: one file per verb; errors become one line and an exit code of the contract."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import ktrain
from ktrain.base import contract
from ktrain.base.exits import exit_code
from ktrain.cli import (
    cancel,
    ckpt,
    cluster_events,
    cluster_list,
    delete,
    doctor,
    exchange,
    exec_in_pod,
    gc,
    history,
    launch,
    logs,
    port_forward,
    quarantine,
    resume,
    status,
    upgrade,
    wait,
)  # fmt: skip
from ktrain.errors import KtrainError, NotFoundError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ktrain.__version__, prog_name="ktrain")
def cli() -> None:
    """Fault-tolerant PyTorch training: a failure costs seconds."""


cli.add_command(launch.launch)
cli.add_command(status.status)
cli.add_command(logs.logs)
cli.add_command(cancel.cancel)
cli.add_command(wait.wait)
cli.add_command(cluster_events.events)
cli.add_command(exec_in_pod.exec_command)
cli.add_command(port_forward.port_forward)
cli.add_command(delete.delete)
cli.add_command(cluster_list.list_command)
cli.add_command(doctor.doctor)
cli.add_command(resume.resume)
cli.add_command(history.history)
cli.add_command(gc.collect)
cli.add_command(ckpt.ckpt)
ckpt.ckpt.add_command(upgrade.upgrade)
ckpt.ckpt.add_command(exchange.export_command)
ckpt.ckpt.add_command(exchange.import_command)
ckpt.ckpt.add_command(quarantine.quarantine)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves with its exit code."""
    try:
        code = cli.main(args=None if argv is None else list(argv), prog_name="ktrain", standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = contract.EXIT_USAGE
    except click.Abort:
        code = contract.EXIT_STOPPED
    except KtrainError as error:
        for line in (str(error), *getattr(error, "__notes__", ())):
            click.echo(f"ktrain: {line}", err=True)
        # What a command names and is not there is bad input; to a worker it is a failure like others.
        code = contract.EXIT_USAGE if isinstance(error, NotFoundError) else exit_code(error)
    except BrokenPipeError:
        code = contract.EXIT_OK  # the reader of our output has seen enough
    sys.exit(code if isinstance(code, int) else contract.EXIT_OK)


if __name__ == "__main__":
    main()
