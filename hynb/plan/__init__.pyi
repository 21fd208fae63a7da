from . import limits as limits
from . import memory as memory
from . import ops as ops
from . import zero as zero
