"""Videos, animations, folders of pictures and archives of them → packed clips, which training reads
frame by frame.

`python -m mostgan.prepare SRC DST --resolution 256` is the command, `prepare` the same as a
function.
"""

from mostgan.prepare.data_sets import check, open_data, pack_sky, prepare
from mostgan.prepare.pack import pack

__all__ = ["check", "open_data", "pack", "pack_sky", "prepare"]
