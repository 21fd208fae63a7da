from .description import describe as describe  # for users
from .serving import serving_text as serving_text
