"""Studies: runs that belong together, an order and a stopping rule. Cross-validation, method auto and the refit are studies.

`carry_out` is what every door calls: it does what a request asks for, whether that is one run or several.
"""

from finetune.studies.carry_out import carry_out

__all__ = ["carry_out"]
