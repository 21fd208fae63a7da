from .answers import answers as answers
from .answers import split_answer as split_answer
