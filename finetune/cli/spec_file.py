"""`spec`: print a job spec with all fields, as documentation and as a file to start from."""

from __future__ import annotations

import click

from finetune.cli.training import json_option


@click.command()
@click.argument("field", required=False, default="")
@json_option
def spec(field: str, as_json: bool) -> None:
    """Print a spec file with all fields and their meanings.

    A spec file holds the settings of a job. The output is one with all default values; each field has a comment with its
    meaning and the allowed values. With FIELD, only that field or section is printed. With --json, the JSON schema of the whole
    spec is printed, which editors use to complete and check YAML files.

    \b
    finetune spec > job.yaml          then edit it, and: finetune train job.yaml
    finetune spec hyperparameters     the fields of one section
    finetune spec data.class_weights  one field
    """
    from finetune.spec import JobSpec
    from finetune.spec_template import annotated_spec

    if as_json:
        from finetune.cli.terminal import print_json

        print_json(JobSpec.model_json_schema())
    else:
        click.echo(annotated_spec(field), nl=False)
