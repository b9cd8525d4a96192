"""Scenes: photographs with objects placed on them whose masks are known, made as they are asked for.

==============  =================================================================================
`shapes`        the objects: how far a pixel is inside of each
`backgrounds`   photographs cut into a part to train on and a part held out
`scenes`        a scene from its number, and the tasks: which object, which ones, where, how many
`measures`      what share of points, or of attention, lies on an object
==============  =================================================================================

A trained network can be asked on them what no data set of photographs tells: whether its points went to the object.
"""

from .measures import share_on_mask
from .scenes import SPLITS, TASKS, Placed, Scene, Scenes
from .shapes import KINDS

__all__ = ["KINDS", "SPLITS", "TASKS", "Placed", "Scene", "Scenes", "share_on_mask"]
