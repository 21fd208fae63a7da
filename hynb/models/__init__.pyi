from .description import describe as describe
from .serving import serving_text as serving_text
