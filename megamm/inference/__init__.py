"""A trained model that answers: loaded from a run or an export, asked with text, pictures and sounds."""

from megamm.inference.generate import Answer, Sampling, answer, ask, generate
from megamm.inference.load import Loaded, load_model
from megamm.inference.prompt import Prompt, make_prompt

__all__ = ["Answer", "Loaded", "Prompt", "Sampling", "answer", "ask", "generate", "load_model", "make_prompt"]
