from . import memory as memory
from . import zero as zero
