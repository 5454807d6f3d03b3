"""Which patches of a picture, stretches of a sound and words made a model answer what it answered."""

from megamm.inference.explain.explain import METHODS, explain
from megamm.inference.explain.explanation import Explanation
from megamm.inference.explain.question import Question, read_question

__all__ = ["METHODS", "Explanation", "Question", "explain", "read_question"]
