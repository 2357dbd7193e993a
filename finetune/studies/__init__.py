"""Studies: sets of runs with an order and a stopping rule. Cross-validation, method auto and the refit are studies.

The command line, the Python functions and the worker all call `carry_out`, which carries out a request as one run or as a study.
"""

from finetune.studies.carry_out import carry_out

__all__ = ["carry_out"]
