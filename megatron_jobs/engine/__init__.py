"""The model and its training step on megatron-core, at any layout, on a GPU or a CPU."""

import logging
import warnings

# A dozen lines at each import on what is not installed; the trainer says in one line which layers it uses.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
warnings.filterwarnings("ignore", category=SyntaxWarning, message="invalid escape sequence")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
