"""Scenes: photographs with objects placed on them, whose masks are known, generated on demand.

==============  ================================================================================
`shapes`        signed distances of flat shapes
`pictures`      small pictures with an alpha channel, at any size and rotation
`objects`       the three sets of objects, and how they are painted
`backgrounds`   photographs, each cut into a training part and a held-out part
`scenes`        a scene from its number, and the tasks
`measures`      the share of points, or of attention, that lies on an object; targets for every position
==============  ================================================================================

Since every mask is known, a trained network can be asked whether its points went to the object.
"""

from .measures import position_targets, share_on_mask
from .objects import OBJECTS, Placed, paint
from .scenes import SPLITS, TASKS, Scene, Scenes
from .shapes import KINDS

__all__ = [
    "KINDS",
    "OBJECTS",
    "SPLITS",
    "TASKS",
    "Placed",
    "Scene",
    "Scenes",
    "paint",
    "position_targets",
    "share_on_mask",
]
