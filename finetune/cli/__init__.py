"""The command line. Commands only translate arguments into a call and its result into text.

Only click is imported here, so that ``finetune --help`` is fast: commands import what they need when they run.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from finetune import __version__
from finetune.cli.backup import backup, restore
from finetune.cli.comparing import compare
from finetune.cli.data import data
from finetune.cli.demo import demo
from finetune.cli.diagnosing import diagnose
from finetune.cli.exporting import export
from finetune.cli.jobs import jobs, keys, worker
from finetune.cli.models import models
from finetune.cli.predicting import predict
from finetune.cli.serving import build, serve
from finetune.cli.spec_file import spec
from finetune.cli.studying import study
from finetune.cli.suggesting import suggest
from finetune.cli.tracking import mlflow
from finetune.cli.training import backbones, check, evaluate, train
from finetune.cli.webhooks import webhooks
from finetune.distribution import install_command
from finetune.errors import FinetuneError, InvalidInput, MissingExtra
from finetune.messages import printable
from finetune.runtime.collector import skip_final_collection


class Sections(click.Group):
    """A click group that lists its commands in sections, in the order in which a user needs them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of commands for each of `SECTIONS`."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                limit = formatter.width - 6 - width
                formatter.write_dl([(f"{command.name:<{width}}", command.get_short_help_str(limit)) for command in commands])


SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Start": (demo, spec, backbones),
    "Data": (check, data, suggest),
    "Training": (train, compare, evaluate, diagnose, study, mlflow),
    "Models": (predict, models, export, build),
    "Server and jobs": (serve, jobs, worker, keys, webhooks),
    "Workspace": (backup, restore),
}


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


for section in SECTIONS.values():
    for command in section:
        cli.add_command(command)


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
    try:
        cli.main(prog_name="finetune", standalone_mode=False)
    except FinetuneError as error:
        _leave(error)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _TRAIN_MODULES:
            raise
        _leave(MissingExtra(f"this command needs {missing}, which only training needs: {install_command('train')}"))
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stopped:
        said = str(stopped.__cause__ or "") or "interrupted"  # click wraps the original exception
        click.echo(f"{said}; the same command resumes it" if _resumes(sys.argv[1:], said) else said, err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None or error.errno not in _UNUSABLE:
            raise
        _leave(InvalidInput(f"{printable(os.fsdecode(error.filename))} cannot be read or written here: {error.strerror}"))
    finally:
        skip_final_collection()


def _resumes(arguments: Sequence[str], said: str) -> bool:
    """Return whether the interrupted command is resumed if it is given again, and `said` does not say so already."""
    queued = any(argument.startswith("--server") for argument in arguments)
    return bool(arguments) and arguments[0] in _RESUMED and not queued and "same command" not in said


def _leave(error: FinetuneError) -> NoReturn:
    from finetune.cli.terminal import show_error

    show_error(error, as_json="--json" in sys.argv)
    sys.exit(error.exit_code)
