"""Stands for the Python of a task that has a defect from a step on:    faulty.py crash|nan STEP -m MODULE ARGUMENT …"""

import math
import os
import runpy
import sys
from typing import Any

_, kind, first, _, module, *arguments = sys.argv
sys.argv = [module, *arguments]
sys.path[0] = os.getcwd()  # as with python -m
if module == "megatron_jobs.train":
    from megatron_jobs.engine.passes import Passes

    gradients = Passes.gradients

    def with_defect(self: Passes, *arguments: Any) -> Any:
        result = gradients(self, *arguments)
        if self.state.updates + 1 >= int(first):
            if kind == "crash":
                raise RuntimeError("planted")
            self.state.parameters[0].parameter.main_grad.mul_(math.nan)
        return result

    Passes.gradients = with_defect
runpy.run_module(module, run_name="__main__")
