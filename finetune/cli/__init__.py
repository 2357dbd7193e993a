"""The command line. Commands only translate arguments into a call and its result into text.

Only click is imported here, so that ``finetune --help`` is fast. The module of a command is imported when the command is used,
and imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

import click

from finetune import __version__
from finetune.distribution import install_command
from finetune.errors import FinetuneError, InvalidInput, MissingExtra
from finetune.messages import printable
from finetune.runtime.collector import skip_final_collection


class Sections(click.Group):
    """A click group that imports its commands on first use, and lists them in sections in which a user needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, in alphabetical order."""
        return sorted(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command with this name; None if there is none."""
        if cmd_name in _MODULES and cmd_name not in self.commands:
            self.add_command(getattr(import_module(_MODULES[cmd_name]), cmd_name))
        return super().get_command(ctx, cmd_name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command in the arguments; the error for an unknown one suggests a command with a similar name."""
        if args[0] not in _MODULES:
            for name in _MODULES:
                self.get_command(ctx, name)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of commands for each of `SECTIONS`."""
        width = max(map(len, _MODULES))
        for title, modules in SECTIONS.items():
            with formatter.section(title):
                limit = formatter.width - 6 - width
                commands = {name: self.get_command(ctx, name) for name in modules}
                formatter.write_dl(
                    [(f"{name:<{width}}", command.get_short_help_str(limit)) for name, command in commands.items() if command]
                )


SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Start": {"demo": "finetune.cli.demo", "spec": "finetune.cli.spec_file", "backbones": "finetune.cli.training"},
    "Data": {"check": "finetune.cli.training", "data": "finetune.cli.data", "suggest": "finetune.cli.suggesting"},
    "Training": {
        "train": "finetune.cli.training",
        "compare": "finetune.cli.comparing",
        "evaluate": "finetune.cli.training",
        "diagnose": "finetune.cli.diagnosing",
        "study": "finetune.cli.studying",
        "mlflow": "finetune.cli.tracking",
    },
    "Models": {
        "predict": "finetune.cli.predicting",
        "models": "finetune.cli.models",
        "export": "finetune.cli.exporting",
        "build": "finetune.cli.serving",
    },
    "Server and jobs": {
        "serve": "finetune.cli.serving",
        "jobs": "finetune.cli.jobs",
        "worker": "finetune.cli.jobs",
        "keys": "finetune.cli.jobs",
        "webhooks": "finetune.cli.webhooks",
    },
    "Workspace": {"backup": "finetune.cli.backup", "restore": "finetune.cli.backup"},
}
"""The commands in the order in which a user needs them, and the module of each."""

_MODULES = {name: module for section in SECTIONS.values() for name, module in section.items()}


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="finetune")
def cli() -> None:
    """Fine-tune pretrained image classifiers on your own images, compare and serve them.

    \b
    finetune demo                         see it all on an example, about 2 min
    finetune check photos                 examine the images, show the plan
    finetune train photos                 train a linear probe, the fast method
    finetune train photos --method full   train all stages of the network
    finetune compare photos               which method is better, how surely?
    finetune predict some.jpg             classify images
    finetune serve                        answer over HTTP, with a page at /

    Here `photos` is a folder with one folder of images per class; many other formats are read too. `finetune COMMAND --help`
    explains a command, with examples. Models, runs and caches are stored in the folder .finetune, or where FINETUNE_HOME points.

    Exit codes: 0 success, 1 failure, 2 invalid input, 130 interrupted.
    """


_TRAIN_MODULES = frozenset(
    {
        "albumentations",
        "cv2",
        "huggingface_hub",
        "matplotlib",
        "mlflow",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "pandas",
        "psutil",
        "safetensors",
        "scipy",
        "sklearn",
        "tensorboard",
        "threadpoolctl",
        "timm",
        "torch",
        "torchvision",
    }
)
"""Modules that the extra "train" installs. If one is missing, the error message names the extra."""

_RESUMED = ("train", "compare", "study")  # commands that resume an interrupted run if they are given again


_UNUSABLE = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    }
)
"""Errors of the operating system that are about a path, which a user has given or can change."""


def main() -> None:
    """Run a command; print a `FinetuneError` on stderr and exit with its code (1 failed, 2 bad input)."""
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")  # they are for programmers, and name no file
    try:
        cli.main(prog_name="finetune", standalone_mode=False)
    except FinetuneError as error:
        _exit_with(error)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN_MODULES:
            raise
        _exit_with(MissingExtra(f"this command needs {missing}, which only training needs: {install_command('train')}"))
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stopped:
        message = str(stopped.__cause__ or "") or "interrupted"  # click wraps the original exception
        click.echo(f"{message}; the same command resumes it" if _resumes(sys.argv[1:], message) else message, err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.errno not in _UNUSABLE:
            raise
        _exit_with(InvalidInput(f"{printable(os.fsdecode(error.filename))} cannot be read or written here: {error.strerror}"))
    finally:
        skip_final_collection()


def _resumes(arguments: Sequence[str], message: str) -> bool:
    """Return whether the interrupted command is resumed if it is given again, and `message` does not say so already."""
    queued = any(argument.startswith("--server") for argument in arguments)
    return bool(arguments) and arguments[0] in _RESUMED and not queued and "same command" not in message


def _exit_with(error: FinetuneError) -> NoReturn:
    from finetune.cli.terminal import show_error

    show_error(error, as_json="--json" in sys.argv)
    sys.exit(error.exit_code)
