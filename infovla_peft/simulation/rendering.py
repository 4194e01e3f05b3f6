"""Off-screen rendering of a LIBERO scene."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

RENDERERS = ("fast", "exact")


class SceneRenderer:
    """Renders square pictures of the current state.

    "exact" gives LIBERO's own pictures. "fast" leaves out reflections and multisampling: a quarter of the time; 5 to
    8 % of the pixels differ (edges, the table's gloss). Use the same one for training and evaluation.

    Args:
        model, data: MuJoCo's.
        image_size: edge of the pictures in pixels.
        renderer: one of `RENDERERS`.
    """

    def __init__(self, model: Any, data: Any, image_size: int, renderer: str) -> None:
        import mujoco

        self._mujoco, self._model, self._data, self._size = mujoco, model, data, image_size
        # These are read when the context is made; afterwards they have no effect.
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if renderer == "fast":
            model.vis.quality.offsamples = 0
        if not model.light_castshadow.any():
            model.vis.quality.shadowsize = 0
        # mujoco.Renderer takes the back end that was set when mujoco was first imported, perhaps not by us.
        self._gl = import_module(f"mujoco.{os.environ['MUJOCO_GL']}").GLContext(image_size, image_size)
        self._gl.make_current()
        self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_50)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._scene = mujoco.MjvScene(model, maxgeom=model.ngeom + model.nsite + 100)
        if renderer == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options, self._perturbation, self._camera = mujoco.MjvOption(), mujoco.MjvPerturb(), mujoco.MjvCamera()
        self._options.geomgroup[0] = 0  # collision shapes
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._area = mujoco.MjrRect(0, 0, image_size, image_size)

    def render(self, camera: str) -> NDArray[np.uint8]:
        """One picture, uint8 RGB (H, W, 3), upright: LIBERO's frame turned by 180 degrees, as OpenVLA does."""
        mujoco = self._mujoco
        self._camera.fixedcamid = self._model.camera(camera).id
        mujoco.mjv_updateScene(
            self._model,
            self._data,
            self._options,
            self._perturbation,
            self._camera,
            mujoco.mjtCatBit.mjCAT_ALL,
            self._scene,
        )
        self._gl.make_current()
        pixels = np.empty((self._size, self._size, 3), dtype=np.uint8)
        mujoco.mjr_render(self._area, self._scene, self._context)
        mujoco.mjr_readPixels(pixels, None, self._area, self._context)
        return np.ascontiguousarray(pixels[::-1, ::-1])

    def close(self) -> None:
        """Free the OpenGL context."""
        if self._context is not None:
            # Object numbers are the context's own: freed while another is current, they would delete its objects.
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._context = None

    def __del__(self) -> None:
        with suppress(Exception):  # at interpreter exit the library may be gone
            self.close()
