"""``python -m finetune``: the command line, for callers that know the interpreter but not the path of the script."""

from finetune.cli import main

main()
