"""The model and its training step on megatron-core, at any layout, on a GPU or a CPU."""

import gc
import logging
import warnings

# A dozen lines at each import on what is not installed; the trainer says in one line which layers it uses.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
warnings.filterwarnings("ignore", category=SyntaxWarning, message="invalid escape sequence")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

# A million objects come with megatron-core, and none of them ever goes: the garbage collector looks at them neither while they come (a
# fifth of a rank's start), nor at every full collection of a run (0.2 s, each rank at another step), nor at its end.
gc.disable()
from megatron_jobs.engine import core as core  # noqa: E402

gc.freeze()
gc.enable()
