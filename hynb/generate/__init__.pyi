from .generation import answers as answers
from .generation import main as main
from .generation import split_answer as split_answer
