from .answer import Answer as Answer  # for users
from .answer import shown_answer as shown_answer
from .answer import shown_message as shown_message
from .generation import AnsweringModel as AnsweringModel
from .generation import answers as answers
from .generation import question_of as question_of
