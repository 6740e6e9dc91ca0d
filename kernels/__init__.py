from loramill.kernels.adapter import ROWS, Delta, Layout, PackedAdapter, Site
from loramill.kernels.batch import Batch, Run, Slot
from loramill.kernels.slab import SiteSlab, Slab
