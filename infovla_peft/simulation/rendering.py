"""Off-screen rendering of a LIBERO scene."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RENDERERS = ("fast", "exact")


class SceneRenderer:
    """Renders square pictures of the current state.

    "exact" gives LIBERO's own pictures. "fast" leaves out reflections and multisampling: about half the time, some
    6 % of the pixels differ (edges, the table's gloss). Use the same one for training and evaluation.
    """

    def __init__(self, model: Any, data: Any, image_size: int, renderer: str) -> None:
        import mujoco

        self._mujoco, self._model, self._data = mujoco, model, data
        # These are read when the OpenGL context is made; afterwards they have no effect.
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if renderer == "fast":
            model.vis.quality.offsamples = 0
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0
        self._renderer = mujoco.Renderer(model, image_size, image_size, max_geom=2 * model.ngeom + model.nsite + 100)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        if renderer == "fast":
            self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def render(self, camera: str) -> NDArray[np.uint8]:
        """One picture, uint8 RGB (H, W, 3), upright: LIBERO's frame turned by 180 degrees, as OpenVLA does."""
        self._renderer.update_scene(self._data, camera, self._options)
        picture: NDArray[np.uint8] = self._renderer.render()
        return np.ascontiguousarray(picture[:, ::-1])

    def close(self) -> None:
        self._renderer.close()
