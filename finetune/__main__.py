"""``python -m finetune``: the command line, for a process that knows its interpreter but not its PATH."""

from finetune.cli import main

main()
